# Two commands: `make demo` and `make test`. Each creates .venv if needed, from pyproject.toml pinned by constraints.txt.
PYTHON ?= python3
STAMP := .venv/.installed

.PHONY: demo test install clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	.venv/bin/emu3-vla demo

test: $(STAMP)
	.venv/bin/python -m pytest -n auto --dist loadfile

clean:
	rm -rf .venv
