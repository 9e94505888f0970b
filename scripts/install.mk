# Installation under $(DESTDIR)$(PREFIX), and its opposite.

##@ Install and clean

.PHONY: install uninstall clean distclean

DESTDIR ?=
TO       = $(DESTDIR)$(PREFIX)

# libbpo.a holds C++ (base/sentencepiece_c.cc), so a C program that links it needs that runtime.
CXX_RUNTIME := $(if $(filter Darwin,$(shell uname -s)),-lc++,-lstdc++)

## install        install the program, library, man page and demo model: PREFIX= DESTDIR=
install: $(BIN) $(BUILD)/libbpo.a
	install -d $(addprefix $(TO)/,bin lib/pkgconfig include share/man/man1 share/bpo)
	install -m 755 $(BIN) $(TO)/bin/bpo
	install -m 644 $(BUILD)/libbpo.a $(TO)/lib/libbpo.a
	install -m 644 bpo.h bpo_error.h $(TO)/include
	install -m 644 cli/bpo.1 $(TO)/share/man/man1/bpo.1
	install -m 644 demo/bpo-demo.bin $(TO)/share/bpo/bpo-demo.bin
	if [ -f bpo_cuda.so ]; then \
	    install -d $(TO)/lib/bpo && install -m 755 bpo_cuda.so $(TO)/lib/bpo; fi
	sed -e 's|@PREFIX@|$(PREFIX)|; s|@VERSION@|$(VERSION)|' \
	    -e 's|@SYSTEM_LIBS@|$(strip $(CXX_RUNTIME) -pthread $(SYSTEM_LIBS))|' \
	    scripts/bpo.pc.in >$(BUILD)/bpo.pc
	install -m 644 $(BUILD)/bpo.pc $(TO)/lib/pkgconfig/bpo.pc

## uninstall      remove what install put there
uninstall:
	rm -f $(addprefix $(TO)/,bin/bpo lib/libbpo.a include/bpo.h include/bpo_error.h \
	    lib/pkgconfig/bpo.pc share/man/man1/bpo.1 share/bpo/bpo-demo.bin lib/bpo/bpo_cuda.so)
	rmdir $(TO)/share/bpo $(TO)/lib/bpo 2>/dev/null || true

## clean          remove what was built
clean:
	rm -rf build bpo bpo-plain bpo_cuda.so

## distclean      ... and the Python environments
distclean: clean
	rm -rf .venv .venv-scale
