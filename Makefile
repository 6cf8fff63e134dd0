# `make book` and `make test` are the two commands of the README; the others are for people who change the book.
PY ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: nb nb-export

# --- one notebook: edit nbs/_py/NN_name.py, then `make nb NB=NN_name` -------------------------------------------------
nb-export:
	@flock .venv/.nb.lock $(BIN)/python tests/nbtool.py export $(NB)
nb: nb-export
	@$(BIN)/python tests/nbtool.py run $(NB)
