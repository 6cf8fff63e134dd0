# Targets of the native op; included by the Makefile at the top.
#   make ops           build the op for this CPU into the user's cache
#   make cuda-check    compile and link the CUDA kernels for sm_80 and sm_90 and import the result; needs nvcc, no GPU
#   make ops-sanitize  the op's tests with the C++ and the CUDA-on-CPU code under address and undefined-behaviour sanitizers
#   make wheel         a wheel with the op for all x86-64 CPUs (no compiler needed where it is installed), tried in an empty venv
.PHONY: ops cuda-check ops-sanitize wheel
OPS_PY ?= .venv/bin/python
OPS_OUT ?= build/ops

ops:
	@$(OPS_PY) -c "from semidetr.detectors.native import build_ops; print(build_ops())"

cuda-check:
	@$(OPS_PY) tests/csrc/cuda_check.py $(OPS_OUT)

ops-sanitize:
	@$(OPS_PY) tests/csrc/sanitize.py $(OPS_OUT)

wheel:
	@$(OPS_PY) tests/csrc/make_wheel.py dist
