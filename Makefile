# The commands of this project. Each target is a script in scripts/; they install what is missing (Debian 12 with Rust).
# PG_CONFIG=/path/to/pg_config chooses another Postgres than Debian's 15; `make test` takes 15 and 18 if it is not set.
.DEFAULT_GOAL := help
.PHONY: help demo demo-stop test fuzz lint fmt install soak bench clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: ## build, then fill a column of real texts with a real local model (about 1.5 GB to download, once)
	@scripts/demo

demo-stop: ## stop what `make demo` left running
	@scripts/demo stop

test: ## run every test
	@scripts/test

fuzz: ## fuzz every parser of foreign bytes, a minute each (FUZZ_SECONDS)
	@scripts/fuzz $(FUZZ_SECONDS)

lint: ## formatting, clippy, rustdoc, shellcheck, licences
	@scripts/lint

fmt: ## format the Rust code
	cargo fmt --all

install: ## build for release and install into the Postgres of PG_CONFIG
	@scripts/install release

soak: ## a million rows under random kills and faults for a quarter of an hour (SOAK_ROWS, SOAK_SECONDS, SOAK_SEED)
	@scripts/soak

bench: ## run the benchmarks, some 20 minutes; results go to bench/results/
	@bench/run $(BENCH)

clean: demo-stop ## remove what was built; downloads stay
	cargo clean

distclean: clean ## remove downloads too
	rm -rf .cache
