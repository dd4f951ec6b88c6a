# These do all their own set-up (Python >= 3.10 and make, nothing else):
#   make demo         dense against sparse attention on a real clip, with a picture
#   make check        lint, types, import contracts and the quick tests, in under a minute once it is set up
#   make test         all of that and the whole suite, as CI runs them
#   make test-oldest  the core, the public functions and the CPU backends with the oldest versions that are allowed
#   make coverage     which lines of rainfusion/core its tests run; fails below the floor in pyproject.toml
#   make quality      a small trained video model, dense against sparse, in a few minutes

PYTHON ?= python3
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo check test test-oldest coverage quality docs clean

demo: .venv-demo/ready
	.venv-demo/bin/rainfusion run bikes --png demo/bikes.png

check: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy
	.venv-test/bin/lint-imports
	.venv-test/bin/python -m pytest -q -m quick tests/core tests/public

# A worker a core, at most four, and one thread in each: most tests are too small for more.
test: check .venv-npu/ready
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal
	.venv-test/bin/python -m hw_matrix check

coverage: .venv-test/ready
	OMP_NUM_THREADS=1 .venv-test/bin/python -m coverage run -m pytest -q tests/core tests/public
	.venv-test/bin/python -m coverage report

test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal \
	  tests/core tests/public tests/plugins tests/backends/test_reference.py tests/backends/test_torch.py \
	  tests/backends/test_openvino.py

quality: .venv-quality/ready
	.venv-quality/bin/python benchmarks/quality/measure.py --groups quick --device cpu --scenes 2 --steps 12 \
	  --grid 21x16x16 --json quality/quick.json --picture quality/quick.png

docs: .venv-docs/ready
	.venv-docs/bin/sphinx-build --fail-on-warning --fresh-env docs docs/_build/html

.venv-demo/ready: EXTRAS = demo
.venv-test/ready: EXTRAS = test
.venv-docs/ready: EXTRAS = docs
.venv-quality/ready: EXTRAS = quality

# A second environment for tests/ascend: torch_npu beside torch, which then needs CANN or a stand-in to be imported.
# MindIE-SD has a folder of its own there, since tests run with and without it; its wheel does not ask for the other two.
# Where a wheel cannot be had, what pip said is kept, and the tests of it are skipped with it (CI fails instead).
.venv-npu/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-npu
	.venv-npu/bin/python $(PIP_INSTALL) --editable '.[ascend-test]' 2> .venv-npu/said \
	  || { grep -m 1 ERROR .venv-npu/said || echo pip failed; } > .venv-npu/missing
	.venv-npu/bin/python $(PIP_INSTALL) --no-deps --target .venv-npu/mindiesd mindiesd einops safetensors \
	  2> .venv-npu/said || { grep -m 1 ERROR .venv-npu/said || echo pip failed; } > .venv-npu/missing-mindiesd
	touch $@

# Python 3.10 to 3.12: later ones have no NumPy 1.26. For a torch without CUDA's libraries, set PIP_EXTRA_INDEX_URL.
.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
	  --editable '.[cli,openvino,test-oldest,torch]'
	touch $@

.venv-%/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv-demo .venv-test .venv-oldest .venv-npu .venv-docs .venv-quality demo quality docs/_build
