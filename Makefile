# make demo    code sample photographs with the weights that ship, into results/demo
# make report  results/report.html: those photographs by other codecs as well, with curves and tables; some minutes
# make test    the fast tests, in two processes, e.g. make test JOBS=8        make test-slow   the slow ones
# make test-browser   the report in headless Chromium; installs Playwright, and a Chromium where there is none
# make lint    undefined names, unused imports, formatting
# make bench-hostile    10,000 altered files and 1,000 resealed ones: refused, in time and in little memory
# make bench   time and operations of every part of coding, e.g. make bench BENCH="--quality 40 --device cuda"
# make bench-cuda    the speeds that docs/speed.md states of CUDA, as many as two and a half minutes allow: results/cuda; needs a GPU
# make bench-train   training speed and memory, e.g. make bench-train BENCH="--stages codec"
# make bench-folder   200 pictures one after the other and as inference.py does it, e.g. make bench-folder BENCH="--count 24"
# make rehearse    the paper's size from pictures to a coded picture in minutes, and how long the whole would take:
#              results/rehearsal; e.g. make rehearse BENCH="--data pictures/"
# Each sets up .venv first, once.

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# The first interpreter that runs and is a Python 3.11 or 3.12; `make PYTHON=... demo` names another.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo report test test-slow test-browser lint bench bench-hostile bench-cuda bench-train bench-folder rehearse clean
.DEFAULT_GOAL := demo

demo: $(INSTALLED)
	@$(PY) inference.py --demo --quality 30 -o results/demo --overview --overwrite
	@echo "pictures and tables: results/demo (start with overview.png)"

report: $(INSTALLED)
	@$(PY) reproduce.py report --demo

# Processes that share the test files, one thread each.
JOBS ?= 2

test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile

test-slow: $(INSTALLED)
	@$(PY) -m pytest -q -m slow -o faulthandler_timeout=0

# Debian's Chromium stands in where Playwright's own cannot be downloaded.
test-browser: $(INSTALLED)
	@$(PY) -m pip install --quiet --disable-pip-version-check playwright==1.65.2
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
		$(PY) -m playwright install --with-deps --only-shell chromium || apt-get install --yes chromium
	@$(PY) -m pytest -q -m browser -rs

lint: $(INSTALLED)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

bench-hostile: $(INSTALLED)
	@$(PY) -m benchmarks.hostile

bench: $(INSTALLED)
	@$(PY) reproduce.py timing $(BENCH)

bench-cuda: $(INSTALLED)
	@$(PY) -m benchmarks.cuda $(BENCH)

bench-train: $(INSTALLED)
	@$(PY) -m benchmarks.train $(BENCH)

bench-folder: $(INSTALLED)
	@$(PY) -m benchmarks.folder $(BENCH)

rehearse: $(INSTALLED)
	@$(PY) -m benchmarks.rehearse $(BENCH)

$(INSTALLED): requirements.txt
	@$(or $(PYTHON),python3) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else "error: Python 3.11 or 3.12 is needed, this is %d.%d; name one with make PYTHON=/path/to/python" % v)'
	@echo "installing into $(VENV) (once; some minutes and 7 GB, most of it PyTorch)"
	@$(or $(PYTHON),python3) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) results
