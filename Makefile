# make upscale   .venv, install, enlarge the bundled photograph x2 by the weights that come with fastsr; fetches no file
#                but Python packages
# make test      the same .venv, with what the tests need; ARGS="-k set5" is passed to pytest
# make test-triton36   the tests that run or compile Triton kernels once more with triton 3.6, which torch 2.11 comes
#                with; everything else is that of .venv
#
# PYTHON   the Python to build .venv from (3.10 to 3.13)
# TORCH    what to install where that Python has no torch of its own; an unpinned torch may fetch gigabytes of CUDA
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: upscale test test-triton36 clean

upscale: $(VENV)/installed
	$(BIN)/fastsr upscale docs/images/astronaut.png -o out/ --scale 2

test: $(VENV)/tested
	$(BIN)/python -m pytest $(ARGS)

test-triton36: $(VENV)/triton36/installed
	$(VENV)/triton36/bin/python -m pytest -m 'interp or aot' $(ARGS)

clean:
	rm -rf $(VENV) build out *.egg-info fastsr/_C.so fastsr/_cuda.so

# A new enough torch that $(PYTHON) can import is kept: .venv then looks through to that Python's packages. Where that
# Python is itself a virtual environment, only a .pth file makes it do so.
KEEP := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
$(VENV)/torch:
	rm -rf $(VENV)
	if $(PYTHON) -c '$(KEEP)' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV) && \
		{ $(BIN)/python -c 'import torch' 2>/dev/null || \
		$(PYTHON) -c '$(SITE)' > "$$($(BIN)/python -c '$(SITE)')/outer.pth"; }; \
	else \
		$(PYTHON) -m venv $(VENV) && $(BIN)/pip install '$(TORCH)'; \
	fi
	$(BIN)/python -c '$(KEEP)'
	touch $@

# Python files are used in place; a change to anything that setup.py reads installs again.
INSTALL = TORCH_DIR="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')" $(BIN)/pip install
$(VENV)/installed: $(VENV)/torch setup.py pyproject.toml $(shell find csrc -type f)
	$(INSTALL) -e .
	touch $@

# spandrel without its dependencies: torchvision would pin a torch of its own. What it needs is in the test extra.
# What `installed` compiled stays; FASTSR_BUILD=0 keeps this second installation from compiling it again.
$(VENV)/tested: $(VENV)/installed
	FASTSR_BUILD=0 $(INSTALL) -e '.[test]'
	$(BIN)/pip install --no-deps 'spandrel==0.4.*'
	touch $@

# A second environment, whose own packages go before those of .venv, which it looks through to.
$(VENV)/triton36/installed: $(VENV)/tested
	rm -rf $(VENV)/triton36
	$(PYTHON) -m venv --system-site-packages $(VENV)/triton36
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" \
		> "$$($(VENV)/triton36/bin/python -c '$(SITE)')/outer.pth"
	$(VENV)/triton36/bin/python -m pip install --no-deps --ignore-installed 'triton==3.6.*'
	touch $@
