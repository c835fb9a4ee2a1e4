# Two commands: `make demo` and `make test`. Each sets up .venv first if it is missing.
PYTHON ?= $(shell command -v python3.11 || echo python3)
RUN = .venv/bin/python
TARGET = models/smollm2-135m-instruct

.venv/ready: requirements.txt requirements-real.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-real.txt
	touch $@

# The whole method on the real chat model, in miniature. So short a training makes a poor drafter: expect right text
# and few accepted tokens; README.md shows the full run. Every stage resumes, so a second run only says what is there.
demo: .venv/ready
	$(RUN) data/smollm2.py
	$(RUN) distill.py generate --target $(TARGET) --self-instruct 64 --max-new-tokens 128 --out out/demo/records.jsonl --resume
	test -f out/pretrain/meta.json || $(RUN) data/pretrain_text.py
	$(RUN) train.py --model small-drafter --embed-from $(TARGET) --out out/demo/base --steps 60 --dtype bfloat16 --resume
	$(RUN) distill.py finetune --target $(TARGET) --draft out/demo/base --data out/demo/records.jsonl --loss kld --chunk 1024 \
		--pretrain-data out/pretrain --steps 60 --eval-records 8 --dtype bfloat16 --out out/demo/drafter --resume
	$(RUN) speculate.py --target $(TARGET) --draft out/demo/drafter --prompt "What are three good reasons to learn to cook?" --max-new-tokens 96

test: .venv/ready
	$(RUN) -m pytest -q -rs

.PHONY: demo test
