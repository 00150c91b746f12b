# Every target works on a fresh clone: it makes the environment first if it is missing.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
STAMP := .venv/.installed
REUSED := $(wildcard $(STAMP))
# DeepSpeed compiles with ninja and its launcher starts `python`: both are the environment's own.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help venv quickstart smoke test test-slow test-slurm bench wheels bench-gpu lint clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## make .venv and install the pinned versions into it
	@echo "$(if $(REUSED),Reusing the environment in .venv (make clean removes it).,Made the environment in .venv.)"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: "$(PYTHON)" is not Python >= 3.11; name one that is: make PYTHON=/path/to/python3.11' >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; h = os.path.join(sysconfig.get_path("include"), "Python.h"); \
		sys.exit(None if os.path.exists(h) else f"error: {h} is missing; install the headers of Python (python3.11-dev)")'
	@command -v c++ >/dev/null || command -v g++ >/dev/null || \
		{ echo 'error: no C++ compiler; DeepSpeed compiles its collectives with one: install g++' >&2; exit 2; }
ifdef WHEELS
	$(PYTHON) -m venv --system-site-packages .venv
	.venv/bin/python -m pip install --disable-pip-version-check --no-index --no-deps $(WHEELS)/*.whl
else
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
endif
	@touch $@

quickstart: venv  ## raw text to scores, the whole road on this machine (12 minutes on 2 cores)
	.venv/bin/python -m examples.quickstart

smoke: venv  ## a short pretraining on one GPU, or on the CPU where there is none: throughput and MFU
	.venv/bin/python -m examples.smoke

# Two files of tests at a time: a test of ranks often waits, and one of data preparation needs one core.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile
test: venv  ## the tests
	.venv/bin/python -m pytest $(TWO_AT_A_TIME)

test-slow: venv  ## the slower proofs
	.venv/bin/python -m pytest -m slow $(TWO_AT_A_TIME)

# Daemons may be where only root's PATH leads. Where systemd runs, Debian's packages start services of their own.
SLURM_PROGRAMS := munged slurmctld slurmd sbatch shellcheck sshd ssh pdsh ip
SLURM_PACKAGES := munge slurmctld slurmd slurm-client shellcheck openssh-server openssh-client pdsh iproute2
test-slurm: export PATH := $(PATH):/usr/sbin
test-slurm: venv  ## the jobs in slurm/ on two nodes started here; root on Debian installs Slurm first
	@for program in $(SLURM_PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing$$missing"; export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES) >/dev/null || \
			echo "apt-get could not install them: their tests are skipped"; \
	fi
	@# Daemons on a busy machine may miss a deadline: what failed is tried once more, on a new cluster.
	.venv/bin/python -m pytest -m slurm || .venv/bin/python -m pytest -m slurm --last-failed

bench: venv  ## every benchmark that needs no GPU, side by side with the peers, and docs/performance.md from their results
	.venv/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[bench]'
	.venv/bin/python -m benchmarks.all

# For a GPU machine without a network that has torch: `make wheels WHEELS=DIR` on one with the same Python, then there, with the
# repository and DIR, `make bench-gpu WHEELS=DIR`. The environment is made of that torch and these wheels.
wheels: venv  ## every package of .venv but torch, as wheels in the folder WHEELS
	.venv/bin/python -m pip freeze --exclude-editable --exclude torch | \
		.venv/bin/python -m pip wheel --disable-pip-version-check --quiet --no-deps -w $(WHEELS) -r /dev/stdin

bench-gpu: venv  ## what needs a GPU: training steps beside the peers, kernels, the optimizer
	.venv/bin/python -m pytest -m gpu
	.venv/bin/python -m benchmarks.all --gpu

lint: venv  ## ruff, check and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove .venv and caches (runs/ stays)
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
