.PHONY: check test fuzz mutants bench docs

check: ## lint, format, types
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	mypy

test: ## everything that runs on a CPU
	python -m pytest -n auto --dist loadfile

fuzz: ## mutated files, and ops on any input under the sanitizers: half an hour
	PYTHONPATH=. python tests/fuzz.py
	PYTHONPATH=. python tests/fuzz_ops.py --sanitize --examples 100000

mutants: ## one-line mistakes, and whether the tests notice them: hours
	python tests/mutants.py

bench: ## time and memory of the loss against plain PyTorch
	python -m benchmarks

docs: ## docs/api.md from the docstrings
	python docs/api.py
