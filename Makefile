# Two commands: `make demo` and `make test`. Each sets up .venv first if it is missing.
PYTHON ?= python3.11
RUN = .venv/bin/python
TARGET = models/smollm2-135m-instruct

.venv/ready: requirements.txt requirements-real.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-real.txt
	touch $@

# The whole method on the real chat model, in miniature: about ten minutes on two cores. So short a training makes
# a poor drafter, so expect correct text and few accepted tokens; README.md shows the commands of the full run.
demo: .venv/ready
	$(RUN) data/smollm2.py
	test -f out/demo/records.jsonl || $(RUN) distill.py generate --target $(TARGET) --self-instruct 64 --max-new-tokens 128 --out out/demo/part.jsonl
	test -f out/demo/records.jsonl || mv out/demo/part.jsonl out/demo/records.jsonl
	test -f out/pretrain/meta.json || $(RUN) data/pretrain_text.py
	test -f out/demo/base/model.safetensors || $(RUN) train.py --model small-drafter --embed-from $(TARGET) --out out/demo/base --steps 60 --dtype bfloat16
	test -f out/demo/drafter/model.safetensors || $(RUN) distill.py finetune --target $(TARGET) --draft out/demo/base --data out/demo/records.jsonl \
		--loss kld --pretrain-data out/pretrain --steps 60 --eval-records 8 --dtype bfloat16 --out out/demo/drafter
	$(RUN) speculate.py --target $(TARGET) --draft out/demo/drafter --prompt "What are three good reasons to learn to cook?" --max-new-tokens 96

test: .venv/ready
	$(RUN) -m pytest -q

.PHONY: demo test
