/*
 * session.c - opening a session on a backend: its options, its memory, the KV cache, and the
 * weights there.
 */
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/threads.h"
#include "engine/engine.h"

void bpo_session_options_init(struct bpo_session_options *options) {
    *options = (struct bpo_session_options){.size = sizeof *options, .n_slots = 1, .lookup = -1};
}

int session_options_check(const struct bpo_session_options *o, const struct bpo_model_info *c,
                          struct bpo_error *err) {
    if (o->size != sizeof *o) {
        return bpo_fail(err, BPO_ERR_USAGE, "fill it with bpo_session_options_init",
                        "session options of another version");
    }
    if (o->n_threads < 0 || o->n_threads > 1024) {
        return bpo_fail(err, BPO_ERR_USAGE, "0 takes the physical cores",
                        "%d threads; expected 0 to 1024", o->n_threads);
    }
    if (o->n_slots < 1 || o->n_slots > 4096) {
        return bpo_fail(err, BPO_ERR_USAGE, "fewer sequences than samples is fine",
                        "%d sequences together; expected 1 to 4096", o->n_slots);
    }
    if (o->lookup < -1 || o->lookup > LOOKUP_MAX) {
        return bpo_fail(err, BPO_ERR_USAGE, "without lookup, as many are drafted as pays",
                        "%d drafted tokens; expected 0 to %d", o->lookup, LOOKUP_MAX);
    }
    if (o->n_positions != 0 && (o->n_positions < 2 || o->n_positions > c->max_positions)) {
        return bpo_fail(err, BPO_ERR_USAGE, "without n_positions, the context has all of them",
                        "a context of %d positions; this model has 2 to %d", o->n_positions,
                        c->max_positions);
    }
    return 0;
}

int check_memory(size_t n_bytes, const char *what, struct bpo_error *err) {
    size_t available = memory_available();
    if (n_bytes <= available) {
        return 0;
    }
    return bpo_fail(err, BPO_ERR_RESOURCE, "lower max_new_tokens or n_samples, or free some memory",
                    "not enough memory: %s would need %.1f MiB, %.1f MiB are available", what,
                    (double)n_bytes / 1048576.0, (double)available / 1048576.0);
}

/* ---------------------------------------------------------------- the backend */

static void backend_describe(struct bpo_session_info *info, const struct kernels *k,
                             const struct backend *b) {
    struct backend_info found;
    k->info(b, &found);
    info->device = found.device;
    info->simd = found.simd;
    info->matmul = found.matmul;
    info->n_threads = found.n_threads;
    (void)snprintf(info->blas, sizeof info->blas, "%s", found.blas);
    (void)snprintf(info->blas_hint, sizeof info->blas_hint, "%s", found.blas_hint);
}

int bpo_cpu_info(struct bpo_session_info *info, struct bpo_error *err) {
    const struct kernels *k = kernels_cpu();
    struct backend *b = k->create(&(struct backend_options){.n_threads = 1}, err);
    if (!b) {
        return BPO_ERR_USAGE;
    }
    *info = (struct bpo_session_info){0};
    backend_describe(info, k, b);
    k->destroy(b);
    return 0;
}

static int session_backend(struct bpo_session *s, const struct bpo_session_options *o,
                           const struct kernels *kernels, struct bpo_error *err) {
    const struct backend_options options = {.n_threads =
                                                o->n_threads ? o->n_threads : threads_default(),
                                            .matmul = o->matmul,
                                            .progress = o->progress,
                                            .user = o->user};
    struct backend_info found;
    s->llama = (struct llama){.config = &s->model->info, .ops = kernels};
    s->llama.backend = kernels->create(&options, err);
    if (!s->llama.backend) {
        return BPO_ERR_RESOURCE;
    }
    kernels->info(s->llama.backend, &found);
    memcpy(s->numerics, found.numerics, sizeof s->numerics);
    backend_describe(&s->info, kernels, s->llama.backend);
    return 0;
}

/* ---------------------------------------------------------------- memory */

/* One line per buffer of the host, zeroed; then those of the backend. The table is used to
 * allocate, to free, and to report. */
enum { N_HOST_BUFFERS = 16, N_BUFFERS = N_HOST_BUFFERS + N_ACTIVATIONS };

static void session_buffers(struct bpo_session *s, struct buffer table[N_BUFFERS]) {
    const struct kernels *k = s->llama.ops;
    struct batch *b = &s->batch;
    struct prefilter *f = &s->prefilter;
    size_t n_slots = (size_t)s->info.n_slots, V = (size_t)s->model->info.vocab_size;
    size_t R = (size_t)s->max_rows, W = (size_t)s->max_wanted;
    size_t n_drawing = k->for_each ? (size_t)s->info.n_threads : 1; /* threads that draw */
    size_t n_blocks = V / PREFILTER_BLOCK + 1;
    const struct buffer host[] = {
        {&s->host_logits, k->host_memory ? 1 : 4 * W * V, true},
        {&s->slots, n_slots * sizeof *s->slots, true},
        {&s->shared, n_slots * sizeof *s->shared, true},
        {&s->drafts, n_slots * sizeof(struct draft *), true},
        {&b->token, 4 * R, true},
        {&b->slot, 4 * R, true},
        {&b->pos, 4 * R, true},
        {&b->spans, R * sizeof *b->spans, true},
        {&b->wanted, 4 * W, true},
        {&b->wanted_by, W * sizeof(struct sequence *), true},
        {&b->params, W * sizeof *b->params, true},
        {&b->forbidden, W * MAX_FORBIDDEN * sizeof *b->forbidden, true},
        {&b->drawn, W * sizeof *b->drawn, true},
        {&f->block_max, n_drawing * n_blocks * sizeof *f->block_max, true},
        {&f->scratch, n_drawing * V * sizeof *f->scratch, true},
        {&f->candidates, n_drawing * V * sizeof *f->candidates, true},
    };
    _Static_assert(sizeof host / sizeof host[0] == N_HOST_BUFFERS, "one line per buffer");
    memcpy(table, host, sizeof host);
    activation_buffers(table + N_HOST_BUFFERS, &s->llama.act, &s->model->info, R, W);
}

static void session_free_buffers(struct bpo_session *s) {
    struct buffer table[N_BUFFERS];
    session_buffers(s, table);
    for (size_t i = 0; i < N_BUFFERS; i++) {
        void *data;
        memcpy(&data, table[i].at, sizeof data);
        if (table[i].on_host) {
            free(data);
        } else if (data) {
            s->llama.ops->free(s->llama.backend, data, table[i].n_bytes);
        }
        data = NULL;
        memcpy(table[i].at, &data, sizeof data);
    }
}

static int session_memory(struct bpo_session *s, struct bpo_error *err) {
    const struct llama *m = &s->llama;
    struct buffer table[N_BUFFERS];
    size_t on_host = 0; /* on the CPU, all of it */
    session_buffers(s, table);
    s->info.buffer_bytes = 0;
    for (size_t i = 0; i < N_BUFFERS; i++) {
        s->info.buffer_bytes += table[i].n_bytes;
        on_host += table[i].on_host || m->ops->host_memory ? table[i].n_bytes : 0;
    }
    int failed = check_memory(on_host, "the activations", err);
    for (size_t i = 0; i < N_BUFFERS && !failed; i++) {
        const struct buffer *b = &table[i];
        void *data = b->on_host ? calloc(1, b->n_bytes)
                                : m->ops->alloc(m->backend, b->n_bytes, MEMORY_BUFFER, err);
        if (!data) {
            failed = b->on_host ? out_of_memory(err, "the session", b->n_bytes) : BPO_ERR_RESOURCE;
        }
        memcpy(b->at, &data, sizeof data);
    }
    for (int32_t i = 0; i < s->info.n_slots && !failed; i++) {
        s->slots[i].prompt_of = -1;
    }
    return failed;
}

/* GPU memory is allocated up front, not on first touch. If the KV cache will not fit beside the
 * weights and scratch buffers, fail now and say how many sequences would fit. */
static int kv_room(const struct bpo_session *s, struct bpo_error *err) {
    const struct llama *m = &s->llama;
    const size_t spare = (size_t)64 << 20, others = s->model->n_file + spare;
    size_t available = 0, total = 0;
    if (!m->ops->memory) {
        return 0;
    }
    int failed = m->ops->memory(m->backend, &available, &total, err);
    if (failed || (others <= available && s->kv_bytes <= available - others)) {
        return failed;
    }
    size_t room = others < available ? available - others : 0;
    size_t n_fit = m->kv.slot_bytes > 0 ? room / m->kv.slot_bytes : 0;
    return bpo_fail(err, BPO_ERR_RESOURCE,
                    n_fit > 0 ? "lower n_slots, n_samples or n_positions"
                              : "lower n_positions, free the GPU, or use device BPO_DEVICE_CPU",
                    "the GPU has no room: %.1f MiB for weights and scratch memory, and %.1f MiB for"
                    " the keys and values of %d sequences of %d positions; %.1f of %.1f MiB are"
                    " free: room for %zu such sequences",
                    (double)others / 1048576.0, (double)s->kv_bytes / 1048576.0, m->kv.n_slots,
                    m->kv.n_positions, (double)available / 1048576.0, (double)total / 1048576.0,
                    n_fit);
}

static int session_kv(struct bpo_session *s, struct bpo_error *err) {
    const struct bpo_model_info *c = &s->model->info;
    struct llama *m = &s->llama;
    int failed = kv_layout(&m->kv, c, s->info.n_slots, s->info.n_positions, &s->kv_bytes, err);
    failed = failed ? failed : kv_room(s, err);
    if (failed) {
        return failed;
    }
    s->info.kv_position_bytes = 2 * (size_t)c->n_layers * (size_t)c->n_kv_heads * m->kv.pos_bytes;
    m->kv.data = m->ops->alloc(m->backend, s->kv_bytes, MEMORY_LAZY, err);
    return m->kv.data ? 0 : BPO_ERR_RESOURCE;
}

/* Points the weights to where the backend has them: the CPU reads the mapped file, a GPU its own
 * copy. */
static int session_weights(struct bpo_session *s, struct bpo_error *err) {
    struct llama *m = &s->llama;
    size_t n_layers = (size_t)s->model->info.n_layers, n_file;
    const uint8_t *file = safetensors_bytes(s->model->file, &n_file);
    const uint8_t *base = m->ops->load_weights(m->backend, file, n_file, err);
    if (!base) {
        return BPO_ERR_RESOURCE;
    }
    struct layer_weights *layers = calloc(n_layers, sizeof *layers);
    if (!layers) {
        return out_of_memory(err, "the list of layers", n_layers * sizeof *layers);
    }
    memcpy(layers, s->model->weights.layers, n_layers * sizeof *layers);
    m->weights = s->model->weights;
    m->weights.layers = layers;
    struct weight *others[] = {&m->weights.embedding, &m->weights.norm, &m->weights.lm_head};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        others[i]->data = base + ((const uint8_t *)others[i]->data - file);
    }
    for (size_t l = 0; l < n_layers; l++) {
        struct weight *each = (struct weight *)&layers[l];
        for (size_t i = 0; i < WEIGHTS_PER_LAYER; i++) {
            each[i].data = base + ((const uint8_t *)each[i].data - file);
        }
    }
    return 0;
}

static int session_rope(struct bpo_session *s, struct bpo_error *err) {
    const struct llama *m = &s->llama;
    size_t n_bytes = (size_t)m->config->head_dim / 2 * sizeof(float);
    float *inv_freq = malloc(n_bytes);
    if (!inv_freq) {
        return out_of_memory(err, "RoPE's frequencies", n_bytes);
    }
    rope_inv_freq(inv_freq, m->config->head_dim, (float)m->config->rope_theta);
    int failed = m->ops->upload(m->backend, m->act.inv_freq, inv_freq, n_bytes, err);
    free(inv_freq);
    return failed;
}

/* ---------------------------------------------------------------- all together */

int session_open_on(struct bpo_session *s, const struct bpo_session_options *o,
                    const struct kernels *kernels, struct bpo_error *err) {
    int failed = session_backend(s, o, kernels, err);
    failed = failed ? failed : session_memory(s, err);
    /* Before the weights: if it does not fit, that is known before they travel. */
    failed = failed ? failed : session_kv(s, err);
    failed = failed ? failed : session_weights(s, err);
    failed = failed ? failed : session_rope(s, err);
    return failed;
}

void session_release(struct bpo_session *s) {
    struct llama *m = &s->llama;
    if (m->backend) {
        session_free_buffers(s);
        if (m->kv.data) {
            m->ops->free(m->backend, m->kv.data, s->kv_bytes);
        }
        m->ops->destroy(m->backend);
    }
    free(m->weights.layers);
    *m = (struct llama){0};
}
