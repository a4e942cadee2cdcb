.PHONY: check test bench docs

check: ## lint, format, types
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	mypy

test: ## everything that runs on a CPU
	python -m pytest -n auto --dist loadfile

bench: ## time and memory of the loss against plain PyTorch
	python -m benchmarks

docs: ## docs/api.md from the docstrings
	python docs/api.py
