/* assert_ok.h - fails a test with the message of a struct bpo_error. */
#ifndef BPO_ASSERT_OK_H
#define BPO_ASSERT_OK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "bpo_error.h"

static inline void assert_ok(int failed, const struct bpo_error *err) {
    if (failed) {
        fail_msg("%s", err->message);
    }
}

#endif
