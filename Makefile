# lorch: `make run` builds it and serves a small model, `make test` runs the tests, `make help` lists the rest.
CC ?= cc
CFLAGS ?= -O3 -g
PREFIX ?= /usr/local
PORT ?= 8080
MODEL ?= tests/models/lorch-tiny-q8_0.gguf

# The project's own flags come last, so that CFLAGS from outside replaces only the optimisation.
FLAGS = $(CFLAGS) -std=c99 -Wall -Wextra
SANITIZE = -fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all

lorch: lorch.c lorch.h
	$(CC) $(FLAGS) $(CPPFLAGS) lorch.c -o $@ $(LDFLAGS) -lpthread -lm

run: lorch
	@echo 'The worker starts below. In another terminal, stream a story from it:'
	@echo
	@echo "  curl -N http://127.0.0.1:$(PORT)/execute -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"job_id\":\"story-'\$$(date +%s)'\",\"prompt\":\"Once upon a time\",\"max_tokens\":200,\"temperature\":0.7}'"
	@echo
	@echo 'Ctrl-C ends it. Should port $(PORT) be in use: make run PORT=8081'
	@echo
	@exec ./lorch --model $(MODEL) --port $(PORT)

test:
	./test.sh

# How much of the parsers the tests reach, by gcc and gcov.
coverage:
	tests/coverage.sh

bench: lorch
	tests/bench.sh
	tests/bench_engine.sh

# Libfuzzer for SECONDS on each parser where clang has it, then damaged models of all formats with sanitizers.
SECONDS_EACH ?= 300
fuzz: build
	mkdir -p build/test
	clang -std=gnu99 -g -O1 -DFUZZ_LIBFUZZER -fsanitize=fuzzer,address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all -w \
	  tests/fuzz.c -o build/fuzz-libfuzzer -lpthread -lm
	for t in http json gguf tokenizer utf8 config; do mkdir -p build/fuzz/$$t && LORCH_FUZZ=$$t build/fuzz-libfuzzer -timeout=20 -max_len=20000 \
	  -max_total_time=$(SECONDS_EACH) -artifact_prefix=build/fuzz/$$t- build/fuzz/$$t tests/corpus/$$t || exit 1; done
	clang -std=gnu99 -g -O1 $(SANITIZE) -w tests/fuzz.c -o build/fuzz-asan -lpthread -lm
	build/fuzz-asan mutate full
	build/fuzz-asan memory

# An hour (MINUTES) of mixed load: resident memory and descriptors stay flat, no event is lost.
MINUTES ?= 60
soak: lorch build
	$(CC) -std=c99 -O1 tests/stress.c -o build/stress -lpthread -lm
	ulimit -n 8192; LORCH=./lorch LORCH_SOAK_MINUTES=$(MINUTES) build/stress soak

debug: build
	$(CC) -O0 -g -DLORCH_DEBUG -std=c99 -Wall -Wextra lorch.c -o build/lorch-debug -lpthread -lm

asan: build
	$(CC) -O1 -g $(SANITIZE) -std=c99 lorch.c -o build/lorch-asan -lpthread -lm

build:
	mkdir -p build

install: lorch
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 lorch $(DESTDIR)$(PREFIX)/bin/lorch

clean:
	rm -rf lorch build

help:
	@echo 'make            build ./lorch (CC, CFLAGS)'
	@echo 'make run        build, and serve a small model on port 8080 (MODEL, PORT)'
	@echo 'make test       run all tests: ./test.sh'
	@echo 'make coverage   which lines and branches of the parsers the tests reach (needs gcc and gcov)'
	@echo 'make bench      measure speed, beside llama.cpp where it is at hand: tests/bench.sh, tests/bench_engine.sh'
	@echo 'make fuzz       hostile bytes for every parser, SECONDS_EACH=300 (needs clang)'
	@echo 'make soak       a long mixed load, MINUTES=60'
	@echo 'make debug      build/lorch-debug: without optimisation'
	@echo 'make asan       build/lorch-asan: with address and undefined-behaviour sanitizers'
	@echo 'make install    into PREFIX, /usr/local by default, below DESTDIR'
	@echo 'make clean      remove what was built'

.PHONY: run test coverage bench fuzz soak debug asan install clean help
