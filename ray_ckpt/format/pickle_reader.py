"""A pickle machine that runs nothing and touches nothing: the only one that reads a checkpoint's pickles.

    bytes ── Unpickler(...).load() ──> plain values, stand-ins, and what the reader's own `makers` return

What a pickle names is never looked up. It becomes a `Name`, and what the pickle makes of that an `Instance`: objects of
this load, which remember what was to be done with them. A reader says which names it knows: `constant` stands for
values that nobody can change, `makers` are functions of ours that are called instead of those that are named. State is
set on an `Instance` only, items only on the lists, dicts and sets of this load.

The cost is linear in the bytes: places of the memo are keys of a dict, and keys that take long to hash are refused.

Only operations of protocols 2 to 5 are known, without extension codes and out-of-band buffers: `torch.save` writes
protocol 2, stock DCP the default of its Python.

Source of the format: `Lib/pickletools.py` of CPython. The idea of stand-ins: `torch/_weights_only_unpickler.py`.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any

from ray_ckpt.errors import FormatError, RayCkptError, UnsafeCheckpointError
from ray_ckpt.format import limits
from ray_ckpt.format.stand_ins import CALLS, DICTS, Instance, KeyGuard, Name, is_harmless
from ray_ckpt.text import quoted

__all__ = ["Unpickler"]

_RENAMED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Python 2's names, which protocol 2 uses."""


class Unpickler:
    """Reads one pickle.

    Args:
        data: the pickle.
        what: where it comes from, for messages.
        constant: tells the value, one that nobody can change, which stands for a name; None when there is none.
        makers: name -> function that makes what a call of that name would; on top of Python's own containers.
        load_storage: takes a persistent id; None when the pickle may have none.
        trust_advice: ends the message of a refusal; None when names of functions are no reason for one.
    """

    def __init__(
        self,
        data: bytes,
        what: str,
        *,
        constant: Callable[[str], Any],
        makers: Mapping[str, Callable[..., Any]],
        load_storage: Callable[[Any], Any] | None = None,
        trust_advice: str | None = None,
    ) -> None:
        self._data = data
        self._what = what
        self._constant = constant
        self._makers = makers
        self._load_storage = load_storage
        self._trust_advice = trust_advice
        self._stack: list[Any] = []
        self._marks: list[int] = []
        """Heights of the stack at the open marks."""
        self._memo: dict[int, Any] = {}
        self._names: dict[str, Any] = {}
        self._keys = KeyGuard(what)
        self.has_lost_attributes = False
        """Whether a container had attributes, which were left out."""

    def load(self) -> Any:
        """What the pickle holds.

        Raises:
            FormatError: it is damaged, or exceeds a limit.
            UnsafeCheckpointError: it calls a function that is not known.
        """
        self._check_density()
        try:
            return self._run()
        except RayCkptError:
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            raise FormatError(f"{self._what} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error

    def _check_density(self) -> None:
        """Whether the pickle is more than lists in lists and memo entries: one byte of it would take 64 of memory.
        Bytes that stand in texts are counted too, so that this costs no time."""
        num_containers = sum(self._data.count(code) for code in _CONTAINER_CODES)
        if num_containers > len(self._data) // 3:
            limits.EMPTY_CONTAINERS.check(num_containers, self._what)

    def _run(self) -> Any:
        """The operations that make up most of a pickle are spelled out here, the others are methods."""
        data, stack, memo, marks = self._data, self._stack, self._memo, self._marks
        push, unpack_uint32 = stack.append, _UINT32.unpack_from
        position = 0
        for _ in range(limits.PICKLE_OPERATIONS.value):
            op = data[position]
            position += 1
            if op == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif op == _BINGET:
                push(memo[data[position]])
                position += 1
            elif op == _LONG_BINGET:
                push(memo[unpack_uint32(data, position)[0]])
                position += 4
            elif op == _BINPUT:
                memo[data[position]] = stack[-1]
                position += 1
            elif op == _LONG_BINPUT:
                memo[unpack_uint32(data, position)[0]] = stack[-1]
                position += 4
            elif op == _BININT1:
                push(data[position])
                position += 1
            elif op == _MARK:
                marks.append(len(stack))
            elif op == _TUPLE1:
                stack[-1] = (stack[-1],)
            elif op == _TUPLE2:
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif op == _EMPTY_TUPLE:
                push(())
            elif op in (_REDUCE, _NEWOBJ):
                args = stack.pop()
                stack[-1] = self._make(stack[-1], args, is_class=op == _NEWOBJ)
            elif op == _BUILD:
                state = stack.pop()
                instance = stack[-1]
                if type(instance) is not Instance:
                    self._set_attributes(instance)
                else:
                    instance.state = state
            elif op == _SHORT_BINUNICODE:
                end = position + 1 + data[position]
                push(str(data[position + 1 : end], "utf-8", "surrogatepass"))
                position = end
            elif op == _STOP:
                return stack.pop()
            else:
                position = _OPERATIONS[op](self, position)
        raise limits.PICKLE_OPERATIONS.error("more pickle operations than are read", self._what)

    # -------------------------------------------------------------------------------------------- names and objects

    def _name(self, module: str, name: str) -> Any:
        text = f"{_RENAMED_MODULES.get(module, module)}.{name}"
        if text not in self._names:
            constant = self._constant(text)
            self._names[text] = Name(text) if constant is None else constant
        return self._names[text]

    def _make(self, name: Any, args: Any, *, is_class: bool) -> Any:
        """
        Args:
            is_class: whether a new object of a class is made, which calls no function, however the class is spelled.
        """
        if type(name) is Instance and type(args) is tuple:
            return Instance(name.name, args)
        if type(name) is not Name or type(args) is not tuple:
            raise FormatError(f"{self._what} calls {quoted(name)} with {quoted(args)}, which is no call")
        maker = self._makers.get(name.text)
        if maker is not None:
            return maker(*args)
        call = CALLS.get(name.text)
        if call is not None:
            return call(self._keys, *args)
        if self._trust_advice is not None and not is_class and not is_harmless(name.text):
            raise UnsafeCheckpointError(
                f"{self._what} asks for {name.text[:200]}, which is no part of plain state and could run code; "
                f"{self._trust_advice}"
            )
        return Instance(name.text, args)

    def _set_attributes(self, target: Any) -> None:
        """BUILD on something else than an `Instance`: a model's state dict, whose `_metadata` nobody needs."""
        if type(target) not in DICTS[1:]:
            raise FormatError(f"{self._what} sets attributes of {quoted(target)}, which has none")
        self.has_lost_attributes = True

    def _new_object_ex(self, position: int) -> int:
        options, args = self._stack.pop(), self._stack.pop()
        name = self._stack.pop()
        if type(name) is not Name or type(args) is not tuple or type(options) is not dict:
            raise FormatError(f"{self._what} makes a {quoted(name)}, which is no class")
        self._stack.append(Instance(name.text, (*args, options)))
        return position

    def _global(self, position: int) -> int:
        middle = self._data.index(b"\n", position)
        end = self._data.index(b"\n", middle + 1)
        self._stack.append(self._name(self._data[position:middle].decode(), self._data[middle + 1 : end].decode()))
        return end + 1

    def _stack_global(self, position: int) -> int:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise FormatError(f"{self._what} names {quoted((module, name))}, which is no name")
        self._stack.append(self._name(module, name))
        return position

    def _persistent(self, position: int) -> int:
        if self._load_storage is None:
            raise FormatError(f"{self._what} points outside itself, by {quoted(self._stack[-1])}")
        self._stack[-1] = self._load_storage(self._stack[-1])
        return position

    # -------------------------------------------------------------------------------------------------- containers

    def _pop_mark(self) -> list[Any]:
        height = self._marks.pop()
        items = self._stack[height:]
        del self._stack[height:]
        return items

    def _tuple(self, position: int) -> int:
        self._stack.append(tuple(self._pop_mark()))
        return position

    def _tuple3(self, position: int) -> int:
        self._stack[-3:] = [tuple(self._stack[-3:])]
        return position

    def _append(self, position: int) -> int:
        item = self._stack.pop()
        self._extend([item])
        return position

    def _appends(self, position: int) -> int:
        self._extend(self._pop_mark())
        return position

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is Instance:
            target.add(items)
        else:
            raise FormatError(f"{self._what} appends to {quoted(target)}, which is no list")

    def _set_item(self, position: int) -> int:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])
        return position

    def _set_items(self, position: int) -> int:
        self._update(self._pop_mark())
        return position

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) in DICTS:
            keys = items[::2]
            self._keys.check(keys)
            target.update(zip(keys, items[1::2], strict=True))
        elif type(target) is Instance:
            target.add(items)
        else:
            raise FormatError(f"{self._what} sets items of {quoted(target)}, which is no dict")

    def _add_items(self, position: int) -> int:
        items = self._pop_mark()
        target = self._stack[-1]
        if type(target) is set:
            self._keys.check(items)
            target.update(items)
        elif type(target) is Instance:
            target.add(items)
        else:
            raise FormatError(f"{self._what} adds to {quoted(target)}, which is no set")
        return position

    def _frozen_set(self, position: int) -> int:
        items = self._pop_mark()
        self._keys.check(items)
        self._stack.append(frozenset(items))
        return position

    # ------------------------------------------------------------------------------------------------------ values

    def _take(self, position: int, length: int) -> bytes:
        taken = self._data[position : position + length]
        if len(taken) < length:
            raise EOFError(f"it ends too early: {length} bytes are said to follow")
        return taken

    def _text_or_bytes(self, position: int, length_bytes: int, *, is_text: bool) -> int:
        start = position + length_bytes
        length = int.from_bytes(self._take(position, length_bytes), "little")
        taken = self._take(start, length)
        self._stack.append(str(taken, "utf-8", "surrogatepass") if is_text else taken)
        return start + length

    def _old_text(self, position: int, length_bytes: int) -> int:
        """A text of Python 2."""
        position = self._text_or_bytes(position, length_bytes, is_text=False)
        self._stack[-1] = self._stack[-1].decode("utf-8")
        return position

    def _byte_array(self, position: int) -> int:
        position = self._text_or_bytes(position, 8, is_text=False)
        self._stack[-1] = bytearray(self._stack[-1])
        return position

    def _integer(self, position: int, num_bytes: int, *, signed: bool) -> int:
        self._stack.append(int.from_bytes(self._take(position, num_bytes), "little", signed=signed))
        return position + num_bytes

    def _long(self, position: int, length_bytes: int) -> int:
        length = int.from_bytes(self._take(position, length_bytes), "little")
        limits.INTEGER_BYTES.check(length, self._what)
        return self._integer(position + length_bytes, length, signed=True)

    def _float(self, position: int) -> int:
        self._stack.append(struct.unpack(">d", self._take(position, 8))[0])
        return position + 8

    def _push(self, position: int, value: Any) -> int:
        self._stack.append(value)
        return position

    def _skip(self, position: int, num_bytes: int) -> int:
        self._take(position, num_bytes)
        return position + num_bytes

    def _pop(self, position: int) -> int:
        self._stack.pop()
        return position

    def _drop_mark(self, position: int) -> int:
        self._pop_mark()
        return position

    def _duplicate(self, position: int) -> int:
        self._stack.append(self._stack[-1])
        return position


_UINT32 = struct.Struct("<I")
_MEMOIZE, _BINGET, _LONG_BINGET = pickle.MEMOIZE[0], pickle.BINGET[0], pickle.LONG_BINGET[0]
_BINPUT, _LONG_BINPUT, _MARK = pickle.BINPUT[0], pickle.LONG_BINPUT[0], pickle.MARK[0]
_BININT1, _SHORT_BINUNICODE = pickle.BININT1[0], pickle.SHORT_BINUNICODE[0]
_EMPTY_TUPLE, _TUPLE1, _TUPLE2 = pickle.EMPTY_TUPLE[0], pickle.TUPLE1[0], pickle.TUPLE2[0]
_REDUCE, _NEWOBJ, _BUILD, _STOP = pickle.REDUCE[0], pickle.NEWOBJ[0], pickle.BUILD[0], pickle.STOP[0]

_CONTAINER_CODES = (
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.FROZENSET),
    *(pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.MEMOIZE),
)
"""Operations of one byte that take memory."""

_Operation = Callable[[Unpickler, int], int]
"""Takes the place behind the operation's code, and returns that of the next."""

_OPERATIONS: dict[int, _Operation] = {
    code[0]: operation
    for code, operation in {
        pickle.PROTO: lambda self, position: self._skip(position, 1),
        pickle.FRAME: lambda self, position: self._skip(position, 8),
        pickle.GLOBAL: Unpickler._global,
        pickle.STACK_GLOBAL: Unpickler._stack_global,
        pickle.NEWOBJ_EX: Unpickler._new_object_ex,
        pickle.BINPERSID: Unpickler._persistent,
        pickle.TUPLE: Unpickler._tuple,
        pickle.TUPLE3: Unpickler._tuple3,
        pickle.APPEND: Unpickler._append,
        pickle.APPENDS: Unpickler._appends,
        pickle.SETITEM: Unpickler._set_item,
        pickle.SETITEMS: Unpickler._set_items,
        pickle.ADDITEMS: Unpickler._add_items,
        pickle.FROZENSET: Unpickler._frozen_set,
        pickle.EMPTY_DICT: lambda self, position: self._push(position, {}),
        pickle.EMPTY_LIST: lambda self, position: self._push(position, []),
        pickle.EMPTY_SET: lambda self, position: self._push(position, set()),
        pickle.NONE: lambda self, position: self._push(position, None),
        pickle.NEWTRUE: lambda self, position: self._push(position, True),
        pickle.NEWFALSE: lambda self, position: self._push(position, False),
        pickle.POP: Unpickler._pop,
        pickle.POP_MARK: Unpickler._drop_mark,
        pickle.DUP: Unpickler._duplicate,
        pickle.BININT: lambda self, position: self._integer(position, 4, signed=True),
        pickle.BININT2: lambda self, position: self._integer(position, 2, signed=False),
        pickle.LONG1: lambda self, position: self._long(position, 1),
        pickle.LONG4: lambda self, position: self._long(position, 4),
        pickle.BINFLOAT: Unpickler._float,
        pickle.BINUNICODE: lambda self, position: self._text_or_bytes(position, 4, is_text=True),
        pickle.BINUNICODE8: lambda self, position: self._text_or_bytes(position, 8, is_text=True),
        pickle.SHORT_BINBYTES: lambda self, position: self._text_or_bytes(position, 1, is_text=False),
        pickle.BINBYTES: lambda self, position: self._text_or_bytes(position, 4, is_text=False),
        pickle.BINBYTES8: lambda self, position: self._text_or_bytes(position, 8, is_text=False),
        pickle.BYTEARRAY8: Unpickler._byte_array,
        pickle.SHORT_BINSTRING: lambda self, position: self._old_text(position, 1),
        pickle.BINSTRING: lambda self, position: self._old_text(position, 4),
    }.items()
}
