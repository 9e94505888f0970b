# make            builds ./bpo
# make demo       builds it and rewrites three prompts
# make test       builds and runs all the tests
# make help       lists all targets
#
# Building never installs anything. If a package is missing, a hint follows the compiler's message:
# `make setup` installs it. demo, test and the checks run setup themselves; see scripts/setup.mk.
VERSION    := 0.1.0
PKG_CONFIG ?= pkg-config
PYTHON     ?= python3
PREFIX     ?= /usr/local
BUILD      ?= build
BIN        ?= bpo
PLAIN_BIN  ?= bpo-plain
export CC CXX PKG_CONFIG PYTHON

# CFLAGS and CXXFLAGS are the user's. The results depend on ALL_CFLAGS: without -ffp-contract=off a
# compiler may fuse a multiply and an add on one CPU and not on another, so that the same seed gives
# different texts. Hence no -march either (cpu/ chooses at run time), and never -ffast-math.
CFLAGS   ?= -O3 -g
CXXFLAGS ?= -O2 -g
FEATURES := $(if $(filter Darwin,$(shell uname -s)),-D_DARWIN_C_SOURCE,-D_GNU_SOURCE)
WARNINGS := -Wall -Wextra -Wshadow -Wconversion
ALL_CFLAGS   = -std=c11 -I. $(FEATURES) -DBPO_VERSION='"$(VERSION)"' $(WARNINGS) \
               -ffp-contract=off -pthread $(CFLAGS) $(CPPFLAGS)
ALL_CXXFLAGS = -std=c++17 -I. -Wall -Wextra -pthread $(CXXFLAGS) $(CPPFLAGS)

# $(call library,--libs,NAME) asks pkg-config, or guesses -lNAME. These variables are recursive (=,
# not :=): recipes expand them, after setup has run. Nothing calls SentencePiece's trainer.
library    = $(shell $(PKG_CONFIG) $(1) $(2) 2>/dev/null || \
             echo $(if $(filter --libs,$(1)),-l$(patsubst lib%,%,$(2))))
LIB_CFLAGS = $(foreach name,openblas jansson libxxhash,$(call library,--cflags,$(name)))
LIBS       = $(filter-out -lsentencepiece_train,$(foreach name,sentencepiece openblas jansson \
             libxxhash,$(call library,--libs,$(name)))) $(SYSTEM_LIBS)
SYSTEM_LIBS := -lm $(if $(filter Linux,$(shell uname -s)),-ldl)

objects    = $(patsubst %.c,$(BUILD)/%.o,$(wildcard $(1)))
BASE_OBJS := $(call objects,base/*.c) $(BUILD)/base/sentencepiece_c.o
LIB_OBJS  := $(call objects,*.c engine/*.c cpu/*.c) $(BASE_OBJS)

# -MMD -MP writes the headers that an object depends on next to it. The C++ compiler links, because
# it knows the name of its runtime library.
COMPILE     = $(CC) $(ALL_CFLAGS) $(LIB_CFLAGS) -MMD -MP -c -o $@ $<
COMPILE_CXX = $(CXX) $(ALL_CXXFLAGS) $(call library,--cflags,sentencepiece) -MMD -MP -c -o $@ $<
LINK        = $(CXX) -pthread $(LDFLAGS) -o $@ $^

.DEFAULT_GOAL := all
include scripts/setup.mk

##@ Build and try
## all            build ./bpo (default)
all: $(BIN)
## plain          build ./bpo-plain: the model in bpo.c alone, without engine/ and cpu/
plain: $(PLAIN_BIN)
## demo           rewrite three prompts with the bundled demo model (needs no Python)
demo: $(BIN)
	@scripts/demo.sh ./$(BIN)
## test           run the C tests and the Python tests; no torch, about 4 minutes
test: $(BIN) $(PLAIN_BIN) c-tests bench-programs .venv/base.stamp
	BPO_BIN=./$(BIN) BPO_PLAIN=./$(PLAIN_BIN) .venv/bin/python -m pytest tests

$(BIN): $(call objects,cli/*.c) $(BUILD)/libbpo.a
	$(LINK) $(LIBS) || $(HINT)
# Linked from objects, not from libbpo.a: nothing of engine/ or cpu/ may get into it.
$(PLAIN_BIN): $(BUILD)/bpo-plain.o $(BUILD)/model.o $(BUILD)/tokenizer.o $(BASE_OBJS)
	$(LINK) $(LIBS) || $(HINT)
$(BUILD)/libbpo.a: $(LIB_OBJS)
	rm -f $@
	$(AR) rcs $@ $^
$(BUILD)/%.o: %.c Makefile | $(SETUP)
	@mkdir -p $(@D)
	$(COMPILE) || $(HINT)
# Its scalar C may be vectorised for this machine: that changes no bit, and makes the tests quicker.
NATIVE = $(shell $(CC) -march=native -E -xc /dev/null >/dev/null 2>&1 && echo -march=native)
$(BUILD)/bpo-plain.o: bpo.c Makefile | $(SETUP)
	@mkdir -p $(@D)
	$(COMPILE) -DBPO_PLAIN $(NATIVE) || $(HINT)
$(BUILD)/%.o: %.cc Makefile | $(SETUP)
	@mkdir -p $(@D)
	$(COMPILE_CXX) || $(HINT)

DEPENDENCY_FILES := *.d $(addsuffix /*.d,base engine cpu cli tests bench cuda_on_cpu)
-include $(wildcard $(addprefix $(BUILD)/,$(DEPENDENCY_FILES)))
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: all plain demo test help

MORE := scripts/check.mk scripts/neon.mk scripts/bench.mk scripts/gpu.mk scripts/install.mk
include $(MORE)

## help           show this list
help:
	@awk '/^##@ / { print "\n" substr($$0, 5) } /^## [a-z]/ { print "  make " substr($$0, 4) } \
	    /^##  / { print "       " substr($$0, 4) }' Makefile scripts/setup.mk $(MORE)
	@printf '\nVariables: CC CXX CFLAGS CXXFLAGS LDFLAGS PYTHON PREFIX DESTDIR\n'
