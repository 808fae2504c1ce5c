# One command each from a fresh clone: `make demo`, `make test`. Everything lives in .venv.
# Pass options on with ARGS: `make demo ARGS="--target fsdp1"`, `make test ARGS="-k fingerprint"`.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q --no-compile -c constraints.txt

# Many processes import the same code, so Python keeps it compiled, wherever it is told not to. The packages are compiled as
# they are imported: most of what they bring never is, and pip would take a third of its time for it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-jobs test-slow test-matrix test-cluster test-faults test-frameworks test-versions test-oldest soak bench bench-async bench-planning lint docs format clean constraints

demo: .venv/.installed
	$(BIN)/python jobs/pipeline_to_fsdp.py $(ARGS)

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not jobs and not slow and not matrix and not cluster and not faults and not frameworks and not soak and not oldest" $(ARGS)

# The jobs as a person runs them, on `ray start` clusters and by `ray job submit`; the README's Python.
test-jobs: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "jobs and not slow and not faults" $(ARGS)

# More of the same fault matrix than `make test` has time for.
test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow $(ARGS)

# Every layout saved and loaded in every other, five models.
test-matrix: .venv/.installed-dev
	$(BIN)/python -m pytest -m matrix $(ARGS)

# Workers that die in a save, drained nodes, metrics and a full disk.
test-cluster: .venv/.installed-dev
	$(BIN)/python -m pytest -m cluster $(ARGS)

# Forty seeded runs of the elastic job, whose workers and nodes are killed; half of them save into memory first.
test-faults: .venv/.installed-dev
	$(BIN)/python -m pytest -m faults $(ARGS)

# Two hundred saves and loads, in which something is killed every tenth; five minutes.
soak: .venv/.installed-dev
	$(BIN)/python -m pytest -m soak tests/test_soak.py $(ARGS)

# What other frameworks write, read here; they are installed beside, in .venv-frameworks.
test-frameworks: .venv-frameworks/.installed
	.venv-frameworks/bin/python -m pytest -m frameworks tests/test_frameworks.py $(ARGS)

# The covering part of the suite under other versions of Python, torch and Ray; ARGS are names of some of them.
test-versions:
	$(PYTHON) tests/versions.py $(ARGS)

# What touches Ray most, and two jobs, under the oldest Ray that is supported, which warns where newer ones do not.
test-oldest: build/oldest-ray/.installed
	build/oldest-ray/bin/python -m pytest -o filterwarnings=default -m "not slow and not cluster" tests/test_oldest_ray.py tests/test_ray_internals.py tests/test_cluster_saving.py $(ARGS)

# All measurements, one after the other; ARGS are those of the first.
bench: .venv/.installed-dev
	PYTHONPATH=. $(BIN)/python benchmarks/storage.py $(ARGS)
	PYTHONPATH=. $(BIN)/python benchmarks/layouts.py
	PYTHONPATH=. $(BIN)/python benchmarks/s3.py
	PYTHONPATH=. $(BIN)/python benchmarks/async_save.py
	PYTHONPATH=. $(BIN)/python benchmarks/planning.py
	PYTHONPATH=. $(BIN)/python benchmarks/fingerprints.py
	PYTHONPATH=. $(BIN)/python benchmarks/exporting.py
	PYTHONPATH=. $(BIN)/python benchmarks/tiers.py
	PYTHONPATH=. $(BIN)/python benchmarks/memory.py

bench-async: .venv/.installed-dev
	PYTHONPATH=. $(BIN)/python benchmarks/async_save.py $(ARGS)

bench-planning: .venv/.installed-dev
	PYTHONPATH=. $(BIN)/python benchmarks/planning.py $(ARGS)

lint: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, in build/docs; whatever is warned of is an error.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-frameworks .venv-versions build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Installs again only when what is to be installed has changed.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -e '.[dev]'
	touch $@

.venv/.installed-docs: .venv/.installed-dev
	$(PIP) -e '.[docs]'
	touch $@

.venv-frameworks/.installed: pyproject.toml constraints-frameworks.txt
	$(PYTHON) -m venv .venv-frameworks
	.venv-frameworks/bin/pip install --disable-pip-version-check -q --no-compile -c constraints-frameworks.txt -e '.[frameworks]'
	touch $@

# That Ray alone; everything else is .venv's, behind it on the path.
build/oldest-ray/.installed: .venv/.installed-dev constraints-oldest.txt
	rm -rf build/oldest-ray
	$(BIN)/python -m venv build/oldest-ray
	build/oldest-ray/bin/pip install --disable-pip-version-check -q --no-compile --no-deps -c constraints-oldest.txt ray
	packages=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	  echo "import site; site.addsitedir('$$packages')" > $$(build/oldest-ray/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth
	touch $@

# Chooses the newest versions that go together. torch and ray are pinned by hand: everything here is measured with them.
constraints:
	$(PYTHON) -m venv .venv-uv && .venv-uv/bin/pip install -q uv
	(sed -n '/^#/p' constraints.txt; printf 'torch==2.13.0\nray==2.60.0\n' | .venv-uv/bin/uv pip compile -q --universal \
	  --python-version 3.10 --extra dev --extra docs --constraints - --no-annotate --no-header pyproject.toml) > constraints.new
	mv constraints.new constraints.txt && rm -rf .venv-uv
