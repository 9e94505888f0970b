/*
 * safetensors.c - see safetensors.h. jansson reads the JSON; the hashes are xxHash's XXH3-64.
 */
#include "base/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/memory.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the file is little-endian and used as it is mapped"
#endif

struct safetensors {
    const uint8_t *map;   /* 8 bytes of header length, the header, the data */
    size_t n_map, n_head; /* bytes in all; bytes before the data */
    json_t *header, *metadata;
    struct tensor *tensors; /* [n_all] in the order of their data, with padding */
    size_t n_all, n_tensors;
};

/* Advice to the system, which it may ignore. Pages of 2 MiB, where the file system offers them,
 * save thousands of page faults, for later programs that map the file too. If the file is not in
 * memory yet, the system starts to read it now, while the caller opens a session (measured with
 * 2.2 GB: the first pass over the weights takes 0.8 s instead of 1.0 to 1.4). */
static void advise(const struct safetensors *f) {
#ifdef MADV_HUGEPAGE
    (void)madvise((void *)f->map, f->n_map, MADV_HUGEPAGE);
#endif
    if (f->n_map < memory_available() / 2) {
        (void)posix_madvise((void *)f->map, f->n_map, POSIX_MADV_WILLNEED);
    }
}

/* Maps the file instead of reading it: the system loads pages when they are first used, and
 * processes share them. */
static int map_file(struct safetensors *f, const char *path, struct bpo_error *err) {
    const char *hint =
        "give bpo_model_open a bpo.bin; make one with: export_weights.py HF_DIR -o bpo.bin";
    struct stat st;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &st) != 0) {
        (void)bpo_fail(err, BPO_ERR_MODEL, hint, "cannot open the model %s: %s", path,
                       strerror(errno));
        if (file >= 0) {
            (void)close(file);
        }
        return BPO_ERR_MODEL;
    }
    if (!S_ISREG(st.st_mode) || st.st_size < 10) {
        (void)close(file);
        (void)bpo_fail(err, BPO_ERR_MODEL, hint, "%s is not a model file: it is %s", path,
                       S_ISREG(st.st_mode) ? "nearly empty" : "not a regular file");
        return BPO_ERR_MODEL;
    }
    f->n_map = (size_t)st.st_size;
    void *map = mmap(NULL, f->n_map, PROT_READ, MAP_PRIVATE, file, 0);
    int why = errno;
    (void)close(file);
    if (map == MAP_FAILED || !map) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE, "is the address space limited (ulimit -v)?",
                       "cannot map %s, %zu bytes: %s", path, f->n_map, strerror(why));
        return BPO_ERR_RESOURCE;
    }
    f->map = map;
    advise(f);
    return 0;
}

static int parse_header(struct safetensors *f, const char *path, struct bpo_error *err) {
    uint64_t n_header;
    memcpy(&n_header, f->map, 8);
    if (n_header > f->n_map - 8 || f->map[8] != '{') {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "%s is not a safetensors file, or it is truncated", path);
    }
    f->n_head = 8 + (size_t)n_header;
    json_error_t why;
    f->header =
        json_loadb((const char *)f->map + 8, (size_t)n_header, JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(f->header)) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT, "%s: the header is not valid JSON: %s",
                        path, why.text);
    }
    f->metadata = json_object_get(f->header, "__metadata__");
    return 0;
}

/* The value, if it is an integer from 0 to max; otherwise -1. */
static json_int_t count(const json_t *value, size_t max) {
    json_int_t number = json_is_integer(value) ? json_integer_value(value) : -1;
    return number >= 0 && (uint64_t)number <= max ? number : -1;
}

/* Parses one entry of the header:
 * "name": {"dtype": "F16", "shape": [rows, cols], "data_offsets": [begin, end]}. */
static int parse_tensor(struct tensor *t, const struct safetensors *f, const char *name,
                        const json_t *entry, struct bpo_error *err) {
    const json_t *dtype = json_object_get(entry, "dtype"), *shape = json_object_get(entry, "shape");
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const char *type = json_is_string(dtype) ? json_string_value(dtype) : "(none)";
    size_t n_data = f->n_map - f->n_head;
    *t = (struct tensor){
        .name = name, .is_f16 = strcmp(type, "F16") == 0, .n_dims = json_array_size(shape)};
    if (!t->is_f16 && strcmp(type, "U8") != 0) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "tensor %s has dtype %s; expected F16 or U8", name, type);
    }
    if (json_object_size(entry) != 3 || t->n_dims < 1 || t->n_dims > 2 ||
        json_array_size(offsets) != 2) {
        return bpo_fail(
            err, BPO_ERR_MODEL, MODEL_FILE_HINT,
            "tensor %s: expected a dtype, a shape of one or two dimensions, and two data_offsets",
            name);
    }
    json_int_t begin = count(json_array_get(offsets, 0), n_data),
               end = count(json_array_get(offsets, 1), n_data);
    if (begin < 0 || end < begin) {
        return bpo_fail(
            err, BPO_ERR_MODEL, MODEL_FILE_HINT,
            "tensor %s lies outside the file's %zu bytes of data: is the file truncated?", name,
            n_data);
    }
    size_t n_bytes = t->is_f16 ? 2 : 1;
    for (size_t i = 0; i < t->n_dims; i++) {
        json_int_t n = count(json_array_get(shape, i), n_data);
        if (n < 0 || (n > 0 && n_bytes > n_data / (size_t)n)) {
            return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                            "tensor %s has a shape larger than the file", name);
        }
        t->shape[i] = (size_t)n;
        n_bytes *= (size_t)n;
    }
    if (n_bytes != (size_t)(end - begin)) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "tensor %s: its shape needs %zu bytes, its offsets span %zu", name, n_bytes,
                        (size_t)(end - begin));
    }
    t->data = f->map + f->n_head + begin;
    t->n_bytes = n_bytes;
    return 0;
}

static bool is_pad(const struct tensor *t) {
    return strncmp(t->name, "pad.", 4) == 0;
}

static int by_data(const void *a, const void *b) {
    const struct tensor *ta = a, *tb = b;
    if (ta->data != tb->data) {
        return ta->data < tb->data ? -1 : 1;
    }
    /* an empty tensor comes before its neighbour */
    return (ta->n_bytes > tb->n_bytes) - (ta->n_bytes < tb->n_bytes);
}

static int parse_tensors(struct safetensors *f, struct bpo_error *err) {
    const char *name;
    json_t *entry;
    f->tensors = calloc(json_object_size(f->header) + 1, sizeof *f->tensors);
    if (!f->tensors) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for the list of tensors");
    }
    json_object_foreach(f->header, name, entry) {
        if (entry != f->metadata && parse_tensor(&f->tensors[f->n_all++], f, name, entry, err)) {
            return BPO_ERR_MODEL;
        }
    }
    qsort(f->tensors, f->n_all, sizeof *f->tensors, by_data);
    size_t at = f->n_head;
    for (size_t i = 0; i < f->n_all; i++) {
        const struct tensor *t = &f->tensors[i];
        size_t begin = (size_t)(t->data - f->map);
        if (begin != at) {
            return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                            "tensor %s begins at byte %zu; expected %zu: there is %s", t->name,
                            begin, at, begin < at ? "an overlap" : "a hole");
        }
        if (!is_pad(t) && begin % 64 != 0) {
            return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                            "tensor %s begins at byte %zu, which is not a multiple of 64", t->name,
                            begin);
        }
        f->n_tensors += !is_pad(t);
        at += t->n_bytes;
    }
    if (at != f->n_map) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "the file has %zu bytes, but its tensors end at %zu", f->n_map, at);
    }
    return 0;
}

struct safetensors *safetensors_open(const char *path, struct bpo_error *err) {
    struct safetensors *f = calloc(1, sizeof *f);
    if (!f) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for the model file");
        return NULL;
    }
    int failed = map_file(f, path, err);
    failed = failed ? failed : parse_header(f, path, err);
    failed = failed ? failed : parse_tensors(f, err);
    if (failed) {
        safetensors_close(f);
        return NULL;
    }
    return f;
}

void safetensors_close(struct safetensors *f) {
    if (f) {
        free(f->tensors);
        json_decref(f->header);
        if (f->map) {
            (void)munmap((void *)f->map, f->n_map);
        }
        free(f);
    }
}

const uint8_t *safetensors_bytes(const struct safetensors *f, size_t *n_bytes) {
    *n_bytes = f->n_map;
    return f->map;
}

size_t safetensors_count(const struct safetensors *f) {
    return f->n_tensors;
}

int safetensors_find(struct tensor *tensor, const struct safetensors *f, const char *name,
                     struct bpo_error *err) {
    const json_t *entry = json_object_get(f->header, name);
    if (!entry) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT, "tensor %s is missing", name);
    }
    return parse_tensor(tensor, f, name, entry, err);
}

/* ---------------------------------------------------------------- metadata */

int safetensors_string(const char **value, const struct safetensors *f, const char *key,
                       struct bpo_error *err) {
    const json_t *entry = json_object_get(f->metadata, key);
    *value = json_is_string(entry) ? json_string_value(entry) : "";
    return json_is_string(entry) ? 0
                                 : bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                                            "the header's __metadata__ has no \"%s\"", key);
}

/* jansson parses the number, because strtod depends on the locale. */
int safetensors_number(double *value, const struct safetensors *f, const char *key, double min,
                       double max, struct bpo_error *err) {
    const char *text;
    *value = 0.0;
    if (safetensors_string(&text, f, key, err)) {
        return BPO_ERR_MODEL;
    }
    json_t *number = json_loads(text, JSON_DECODE_ANY, NULL);
    bool fine = json_is_number(number);
    *value = fine ? json_number_value(number) : 0.0;
    json_decref(number);
    if (!fine || *value < min || *value > max) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "the header's \"%s\" is \"%.40s\"; expected a number from %g to %g", key,
                        text, min, max);
    }
    return 0;
}

int safetensors_integer(int32_t *value, const struct safetensors *f, const char *key, int32_t min,
                        int32_t max, struct bpo_error *err) {
    double number;
    int failed = safetensors_number(&number, f, key, min, max, err);
    *value = failed ? 0 : (int32_t)number;
    if (!failed && (double)*value != number) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "the header's \"%s\" is %g; expected an integer", key, number);
    }
    return failed;
}

/* ---------------------------------------------------------------- hashes */

static int compare_hash(const struct safetensors *f, const char *what, const void *bytes,
                        size_t n_bytes, struct bpo_error *err) {
    char key[256], hash[17];
    const char *stored;
    (void)snprintf(key, sizeof key, "xxh3.%s", what);
    if (safetensors_string(&stored, f, key, err)) {
        return BPO_ERR_MODEL;
    }
    (void)snprintf(hash, sizeof hash, "%016llx", (unsigned long long)XXH3_64bits(bytes, n_bytes));
    if (strcmp(hash, stored) != 0) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "%s is damaged: its hash is %s, but the file says %.16s", what, hash,
                        stored);
    }
    return 0;
}

static int verify_header(const struct safetensors *f, struct bpo_error *err) {
    static const char key[] = "\"xxh3.header\":\"";
    char *copy = malloc(f->n_head + 1);
    if (!copy) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for the header");
    }
    memcpy(copy, f->map, f->n_head);
    copy[f->n_head] = '\0';
    char *digits = strstr(copy + 8, key);
    if (digits && strlen(digits) >= sizeof key + 16) {
        memset(digits + sizeof key - 1, '0', 16);
    }
    int failed = compare_hash(f, "header", copy, f->n_head, err);
    free(copy);
    return failed;
}

static int verify_pad(const struct tensor *t, struct bpo_error *err) {
    for (size_t i = 0; i < t->n_bytes; i++) {
        if (t->data[i] != 0) {
            return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                            "%s is damaged: its byte %zu is not zero", t->name, i);
        }
    }
    return 0;
}

int safetensors_verify(const struct safetensors *f,
                       void (*progress)(void *user, uint64_t done, uint64_t total), void *user,
                       struct bpo_error *err) {
    int failed = verify_header(f, err);
    uint64_t done = f->n_head;
    for (size_t i = 0; i < f->n_all && !failed; i++) {
        const struct tensor *t = &f->tensors[i];
        failed =
            is_pad(t) ? verify_pad(t, err) : compare_hash(f, t->name, t->data, t->n_bytes, err);
        done += t->n_bytes;
        if (!failed && progress) {
            progress(user, done, f->n_map);
        }
    }
    return failed;
}
