/* Preloaded into a process: fails, shortens, forges or kills at the k-th call that changes something below a directory.

   Calls are counted from shim_arm on, in the process that armed it and in what it forks after that. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { KILL = 1, EIO_ONCE, ENOSPC_ONCE, SHORT, LIE, FULL, FULL_OF_NAMES, NO_DIRECTORY_SYNC, NO_RENAMEAT2, NO_LINK };

static char root[4096];
static int action, at, calls;

void shim_arm(const char *directory, int what, int when) {
    snprintf(root, sizeof root, "%s", directory);
    action = what;
    at = when;
    calls = 0;
}

int shim_calls(void) { return calls; }

static int below(const char *path) { return root[0] && !strncmp(path, root, strlen(root)); }

static int fd_below(int fd) {
    char link[64], path[4096];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = root[0] ? readlink(link, path, sizeof path - 1) : -1;
    errno = saved;
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int at_below(int fd, const char *path) { return path[0] == '/' ? below(path) : fd_below(fd); }

static int now(void) {
    if (++calls != at) return 0;
    if (action == KILL) kill(getpid(), SIGKILL);
    return 1;
}

/* Whether a call that is counted fails; errno says how. */
static int fails(int needs_name) {
    int hit = now();
    if ((hit && action == EIO_ONCE)) return errno = EIO, 1;
    if ((hit && action == ENOSPC_ONCE) || (needs_name && action == FULL_OF_NAMES)) return errno = ENOSPC, 1;
    return 0;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int opens(int fd, const char *path, int flags, int is_new) {
    return (flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) && at_below(fd, path) && fails(is_new);
}

static int is_new(int fd, const char *path, int flags) {
    struct stat info;
    int saved = errno, found = fstatat(fd, path, &info, 0);
    errno = saved;
    return (flags & O_CREAT) && found != 0;
}

#define MODE                                                                                                            \
    mode_t mode = 0;                                                                                                    \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                                \
        va_list list;                                                                                                   \
        va_start(list, flags);                                                                                          \
        mode = va_arg(list, mode_t);                                                                                    \
        va_end(list);                                                                                                   \
    }

#define OPEN(name)                                                                                                      \
    int name(const char *path, int flags, ...) {                                                                        \
        MODE REAL(name);                                                                                                \
        if (opens(AT_FDCWD, path, flags, is_new(AT_FDCWD, path, flags))) return -1;                                     \
        return real(path, flags, mode);                                                                                 \
    }
#define OPENAT(name)                                                                                                    \
    int name(int fd, const char *path, int flags, ...) {                                                                \
        MODE REAL(name);                                                                                                \
        if (opens(fd, path, flags, is_new(fd, path, flags))) return -1;                                                 \
        return real(fd, path, flags, mode);                                                                             \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (!root[0] || fd < 3 || !size || !fd_below(fd)) return real(fd, data, size);
    int hit = now();
    if (action == FULL || action == FULL_OF_NAMES || (hit && action == ENOSPC_ONCE)) return errno = ENOSPC, -1;
    if (hit && action == EIO_ONCE) return errno = EIO, -1;
    if (hit && action == LIE) return (ssize_t)size;
    return real(fd, data, hit && action == SHORT && size > 1 ? size / 2 : size);
}

int fsync(int fd) {
    REAL(fsync);
    struct stat info;
    if (!fd_below(fd)) return real(fd);
    if (action == NO_DIRECTORY_SYNC && !fstat(fd, &info) && S_ISDIR(info.st_mode)) return errno = EINVAL, -1;
    return fails(0) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return below(to) && fails(0) ? -1 : real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    return at_below(b, to) && fails(0) ? -1 : real(a, from, b, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2);
    if ((action == NO_RENAMEAT2 || action == NO_LINK) && at_below(b, to)) return errno = EINVAL, -1;
    return at_below(b, to) && fails(0) ? -1 : real(a, from, b, to, flags);
}

int link(const char *from, const char *to) {
    REAL(link);
    if (action == NO_LINK && below(to)) return errno = EPERM, -1;
    return below(to) && fails(1) ? -1 : real(from, to);
}

int unlink(const char *path) {
    REAL(unlink);
    return below(path) && fails(0) ? -1 : real(path);
}

int unlinkat(int fd, const char *path, int flags) {
    REAL(unlinkat);
    return at_below(fd, path) && fails(0) ? -1 : real(fd, path, flags);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    struct stat info;
    return below(path) && stat(path, &info) && fails(1) ? -1 : real(path, mode);
}

int rmdir(const char *path) {
    REAL(rmdir);
    return below(path) && fails(0) ? -1 : real(path);
}
