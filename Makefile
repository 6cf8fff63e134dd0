# The two commands of the README are `make book` and `make test`; the others are for people who change the book.
# Python: the first of these that is 3.11 or newer; `make PY=/path/to/python book` takes another.
PY ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
DEMO ?=
BENCH ?=
FUZZ ?=
SOAK ?=
ABLATE ?=

# two cores are used best by two processes of one thread each; a fixed hash seed keeps the order of sets
export OMP_NUM_THREADS ?= 1
export PYTHONHASHSEED ?= 0
export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# glibc gives memory back to the system and asks for it again at every step; on some machines keeping it saves much of a training step on a CPU
KEEP_MEMORY := env MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
# temporary files of tests and notebooks in a folder of their own, which goes when they end
IN_TEMP := TMPDIR=$$(mktemp -d) && export TMPDIR && trap 'rm -rf "$$TMPDIR"' EXIT &&

.PHONY: help book test fuzz soak bench gpu-check gpu-evidence ablations ablations-smoke env site nb nb-export clean
.DELETE_ON_ERROR:

help:
	@echo 'make book   environment, the demonstration on the built-in data, results, the site in _docs/'
	@echo 'make test   environment and every check'
	@echo 'make site   the site alone'
	@echo 'make fuzz   300,000 damaged inputs for every reader, some twenty minutes; FUZZ="--inputs 1000": fewer'
	@echo 'make soak   every method killed at 20 random points, the same command again, the end compared with an unbroken run; SOAK="--kills 2": fewer'
	@echo 'make bench  all timings, about a quarter of an hour on a quiet machine, and their page; BENCH=--quick: a smoke version without the page'
	@echo 'make gpu-check  everything that only a GPU can tell, at most six minutes; needs torch and nvcc, installs nothing'
	@echo 'make gpu-evidence  long trainings side by side on a GPU, at most nine minutes; SEMIDETR_DATA names the folder of fod12 and txl_pbc'
	@echo 'make ablations-smoke  every study of the book, seconds a run, into a temporary folder; make ablations  those whose records are committed, hours'
	@echo 'make nb NB=semi/01_mining   bring the text of one notebook into it, export its module, run it'

# --- the environment: built from the project's own files, and again only when they change ------------------------------
env: $(STAMP)
$(STAMP): settings.ini setup.py pyproject.toml
	@test -n "$(PY)" || { echo 'semidetr needs Python 3.11 or newer, and none was found. Install one, or name it: make PY=/path/to/python3.12 book'; exit 1; }
	@$(PY) -c 'import sys; sys.exit("semidetr needs Python 3.11 or newer, but %s is %d.%d; name another: make PY=/path/to/python3.12 book" % ((sys.executable,) + tuple(sys.version_info[:2])) if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv; $(PY) -m venv .venv; } || { \
		echo 'cannot make .venv: the venv module is missing (Debian and Ubuntu: apt-get install python3-venv)'; exit 1; }
	@echo 'installing semidetr and the tools of the book into .venv (a few minutes the first time; on Linux about 6 GB)'
	@$(BIN)/python -m pip install --no-input -e '.[book]'
	@touch $(STAMP)

# --- the two commands --------------------------------------------------------------------------------------------------
book: $(STAMP)
	@$(KEEP_MEMORY) $(BIN)/semidetr demo $(DEMO)
	@$(BIN)/python tests/nbtool.py fresh ablations/01_mean_teacher
	@$(BIN)/python -m semidetr.book.site >/dev/null
	@echo 'Done. Open _docs/index.html in a browser.'

test: $(STAMP)
	@echo '--- text twins'; $(BIN)/python tests/nbtool.py check
	@echo '--- notebooks'; $(IN_TEMP) $(KEEP_MEMORY) $(BIN)/nbdev_test --n_workers 2 --timing
	@echo '--- tests: export, clean, lint, modules, book, site, links, browser'; \
		$(IN_TEMP) $(KEEP_MEMORY) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fuzz: $(STAMP)
	@$(BIN)/python benchmarks/fuzz.py $(FUZZ)

soak: $(STAMP)
	@$(BIN)/python benchmarks/soak.py $(SOAK)

site: $(STAMP)
	@$(BIN)/python -m semidetr.book.site

# --- timings against other implementations, which the extra [bench] brings ---------------------------------------------
bench: .venv/.bench-installed
	@$(BIN)/python benchmarks/run.py $(BENCH)
	@case '$(BENCH)' in *--quick*|*--out*) ;; *) $(BIN)/python tests/nbtool.py run benchmarks/01_speed ;; esac
.venv/.bench-installed: $(STAMP)
	@$(BIN)/python -m pip install --no-input -e '.[bench]'
	@touch $@

# --- on a machine with a GPU, with the Python that is there: `make gpu-check PY=/path/to/python` ---
GPU ?=
GPU_PY = $(if $(filter file undefined,$(origin PY)),$(firstword $(wildcard $(BIN)/python) $(PY)),$(PY))
gpu-check:
	@$(GPU_PY) benchmarks/gpu_check.py $(GPU)
gpu-evidence:
	@$(GPU_PY) benchmarks/gpu_evidence.py $(GPU)

# --- the studies: all of them for a few iterations, or those whose records are committed, over again -------------------
ablations-smoke: $(STAMP)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(BIN)/semidetr ablate all --scale smoke --out "$$out" $(ABLATE)
ablations: $(STAMP)
	@$(KEEP_MEMORY) $(BIN)/semidetr ablate $(filter-out %-gpu,$(sort $(foreach f,$(wildcard nbs/ablations/results/*/seed*.json nbs/ablations/results/*/*/seed*.json),$(word 4,$(subst /, ,$(f)))))) $(ABLATE)

clean:
	rm -rf _docs build .pytest_cache .ruff_cache

# --- one notebook: edit nbs/_py/LAYER/NN_name.py, then `make nb NB=LAYER/NN_name` -------------------------------------------------
nb-export:
	@$(BIN)/python tests/nbtool.py export $(NB)
nb: nb-export
	@$(BIN)/python tests/nbtool.py run $(NB)

include semidetr/csrc/ops.mk
