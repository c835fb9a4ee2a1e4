# Two commands: `make demo` and `make test`. Each sets up .venv first if it is missing.
PYTHON ?= $(shell command -v python3.11 || echo python3)
RUN = .venv/bin/python

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# What real chat models need besides: for .ci/run, so that the tests that compare with transformers run rather than skip.
real: .venv/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-real.txt
	$(RUN) data/smollm2.py

# The whole method in a world small enough for a laptop, from random weights. Each stage leaves a stamp in $(S), so that
# a second run, or one after an interruption, goes on where the first one stopped. FAST=1: the same with fewer steps.
D = out/tiny
STEPS = 250 1000 1500 500
ANSWERS = 2
BENCH = --limit 12 --gamma 3 5
TEMPERATURES = 0 1
ifdef FAST
D = out/tiny-fast
STEPS = 50 90 200 100
ANSWERS = 1
BENCH = --limit 24 --gamma 3
TEMPERATURES = 1
endif
S = $(D)/stamps
CORPUS = data/tiny_world/passages.jsonl.gz data/tiny_world/pairs.jsonl.gz
TOKENS = --tokenizer $(D)/tokenizer --context 128

demo: .venv/ready
	@echo "Where this is going, with a pair that was trained before:"; $(RUN) speculate.py
	@mkdir -p $(S); test -z "`ls $(S)`" || echo "done before and skipped now:" `ls -tr $(S)` "(rm -r $(D) starts afresh)"
	@$(MAKE) --no-print-directory $(S)/bench
	$(RUN) data/report.py --dir $(D) --out out/demo.png --check
	$(RUN) speculate.py --target $(D)/target --draft $(D)/drafter-aligned --prompt "What does a rabbit look like?" --threads 1 --trace colour

$(S)/data:
	$(RUN) data/tokenizer.py --train $(CORPUS) --out $(D)/tokenizer
	$(RUN) data/tiny_world.py prepare --tokenizer $(D)/tokenizer --out $(D)
	@touch $@

# 1. The target: passages, then conversations.
$(S)/target-base: $(S)/data
	$(RUN) train.py --model tiny-target $(TOKENS) --data $(D)/pretrain --steps $(word 1,$(STEPS)) --learning-rate 2e-3 \
		--out $(D)/target-base --resume
	@touch $@

$(S)/target: $(S)/target-base
	$(RUN) train.py --init $(D)/target-base $(TOKENS) --chat $(D)/chat.jsonl --batch-size 32 --steps $(word 2,$(STEPS)) \
		--learning-rate 2e-3 --out $(D)/target --resume
	@touch $@

# 2. The drafter, on passages alone.
$(S)/drafter-base: $(S)/data
	$(RUN) train.py --model tiny-drafter $(TOKENS) --data $(D)/pretrain --steps $(word 3,$(STEPS)) --learning-rate 1e-2 \
		--out $(D)/drafter-base --resume
	@touch $@

# 3. The target writes the data.
$(S)/records: $(S)/target
	$(RUN) distill.py generate --target $(D)/target --prompts $(D)/prompts.jsonl --per-prompt $(ANSWERS) --max-new-tokens 64 \
		--out $(D)/records.jsonl --resume
	@touch $@

# 4. Alignment. And the control: the same drafter, the same answers, as many steps, but next-token loss.
$(S)/drafter-aligned: $(S)/drafter-base $(S)/records
	$(RUN) distill.py finetune --target $(D)/target --draft $(D)/drafter-base --data $(D)/records.jsonl --loss tvd++ \
		--pretrain-data $(D)/pretrain --batch-size 32 --steps $(word 4,$(STEPS)) --learning-rate 1e-2 \
		--out $(D)/drafter-aligned --resume
	@touch $@

$(S)/drafter-more: $(S)/drafter-base $(S)/records
	$(RUN) train.py --init $(D)/drafter-base $(TOKENS) --chat $(D)/records.jsonl --batch-size 32 --steps $(word 4,$(STEPS)) \
		--learning-rate 1e-2 --eval-every 50 --out $(D)/drafter-more --resume
	@touch $@

# 5. Decoding, timed. One thread: models this small spend a second one on waiting.
$(S)/bench: $(S)/drafter-aligned $(S)/drafter-more
	for draft in base more aligned; do for temperature in $(TEMPERATURES); do \
		$(RUN) speculate.py --target $(D)/target --draft $(D)/drafter-$$draft --bench $(D)/test.jsonl $(BENCH) \
		--temperature $$temperature --max-new-tokens 64 --threads 1 --json $(D)/bench-$$draft-$$temperature.json || exit 2; done; done
	@touch $@

# The pair that comes with the code, data/tiny_world/: what `make demo` trained, in fp16.
pair: demo
	for name in target drafter-base drafter-aligned; do $(RUN) -c "import model, torch; from data import tokenizer; \
		model.save(model.load('$(D)/$$name'), 'data/tiny_world/$$name', torch.float16); \
		tokenizer.copy('$(D)/$$name', 'data/tiny_world/$$name')" || exit 2; done

test: .venv/ready
	$(RUN) -m pytest -q -rs

.PHONY: demo pair test real
