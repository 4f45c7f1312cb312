PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart headline mix pretrained test docs chaos browser check bench image clean

## quickstart: the whole method on this machine, into ./quickstart
quickstart: .venv/ready
	$(BIN)/dem-opt quickstart quickstart

## headline: merging against mixing, placebos and training on the search split, on the quickstart's files
headline: .venv/ready
	$(BIN)/dem-opt quickstart --files quickstart
	$(BIN)/dem-opt train studies/headline.yaml
	$(BIN)/dem-opt run studies/headline.yaml
	$(BIN)/dem-opt compare --placebo studies/headline.yaml
	$(BIN)/dem-opt compare --fine-tune-on-search studies/headline.yaml
	$(BIN)/dem-opt compare --data-mixing study studies/headline.yaml

## mix: shares of the data by `dem-opt mix`, one training on them from either start, and 16 mixtures trained beside it, into ./quickstart/runs/mix
mix: .venv/ready
	$(BIN)/dem-opt quickstart --files quickstart
	$(BIN)/dem-opt train studies/mix.yaml
	$(BIN)/dem-opt run studies/mix.yaml
	$(BIN)/dem-opt mix studies/mix.yaml
	$(BIN)/dem-opt train --mixture proposed studies/mix.yaml
	$(BIN)/dem-opt train --mixture proposed --from composite studies/mix.yaml
	$(BIN)/dem-opt compare --data-mixing study studies/mix.yaml
	$(BIN)/dem-opt mix studies/mix.yaml

## pretrained: the method on SmolLM2-135M and this machine's texts, into ./pretrained; PRETRAINED=FOLDER takes another causal model
pretrained: .venv/ready
	$(BIN)/python studies/pretrained_files.py --model "$(PRETRAINED)"
	$(BIN)/dem-opt train studies/pretrained.yaml
	$(BIN)/dem-opt check --overlap studies/pretrained.yaml
	$(BIN)/dem-opt run studies/pretrained.yaml
	$(BIN)/dem-opt run studies/pretrained-sums.yaml
	$(BIN)/dem-opt compare --data-mixing study studies/pretrained.yaml
	$(BIN)/dem-opt compare --algorithms random,simplex-gp studies/pretrained.yaml
	$(BIN)/dem-opt report studies/pretrained.yaml

## test: all tests in two processes, then those of the services of docker/ by themselves, which have limits of time
test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/docker
	$(BIN)/python -m pytest tests/docker

## docs: every snippet of the pages and the example notebook, on ./quickstart or the one that DEM_OPT_QUICKSTART names
docs: .venv/ready
	$(BIN)/python -m pytest -n 2 -m docs tests/docs

## chaos: faults with real processes: killed drivers, workers and nodes, outages, signals, hostile text
chaos: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --timeout 1200 tests/chaos

## browser: both dashboards and the report in a headless Chromium, under 2 minutes; screenshots in build/screenshots
browser: .venv/browser
	$(BIN)/python -m pytest -m browser tests/dashboards/test_browser.py

## check: lint, format, layers, types, and known vulnerabilities of the pinned dependencies
check: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports && $(BIN)/mypy
	sh dev/audit.sh

## bench: what merges and trials cost beside the machine's limits, under 15 minutes; benchmarks/gpu.py is for a GPU
bench: .venv/ready
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/trial.py

## image: the image of docker/Dockerfile without an engine, by buildah on a base of debootstrap; skipped where these are missing
image:
	$(PYTHON) docker/image.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv/browser: .venv/ready
	$(BIN)/pip install --quiet -c constraints.txt -e '.[browser]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info quickstart pretrained
