# chibishim: a containerd shim for WebAssembly in one Python module.
PYTHON ?= python3
SHARED ?= ../shared

.PHONY: test clean

# Sets up what the tests need and runs them. As root on Debian it installs the
# peers that the tests talk to; elsewhere their tests skip and say so.
test: .venv/ready
	@if [ "$$(id -u)" != 0 ]; then echo "*** not root: tests that need root will be SKIPPED"; fi
	SHARED=$(SHARED) .venv/bin/python -m pytest -q -rs tests

.venv/ready:
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || { apt-get -qq update && apt-get -qq install -y python3-venv; }
	if [ "$$(id -u)" = 0 ] && ! command -v wat2wasm >/dev/null; then apt-get -qq update && apt-get -qq install -y wabt; fi
	$(PYTHON) -m venv .venv
	.venv/bin/pip -q install pytest
	touch $@

clean:
	rm -rf dist .venv
