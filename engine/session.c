/*
 * session.c - opening a session: its options, the backend, the buffers and the weights there.
 */
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "base/memory.h"
#include "base/threads.h"

void bpo_session_options_init(struct bpo_session_options *options) {
    *options = (struct bpo_session_options){.size = sizeof *options, .n_slots = 1, .lookup = -1};
}

/* One line per buffer: where its pointer is kept, its bytes, and whether it is backend memory or
 * (zeroed) host memory. The table is used to allocate, to free, and to report. */
struct buffer {
    void *at; /* of some pointer type: read and written by memcpy */
    size_t n_bytes;
    bool on_host;
};
enum { N_BUFFERS = 32 };

static void session_buffers(struct bpo_session *s, struct buffer table[N_BUFFERS]) {
    const struct bpo_model_info *c = &s->model->info;
    struct activations *a = &s->act;
    struct row_list *r = &s->rows;
    struct sampler *p = &s->sampler;
    size_t samplers = s->kernels->for_each ? (size_t)s->info.n_threads : 1;
    size_t rows = (size_t)s->max_rows, wanted = (size_t)s->max_wanted,
           most = rows > wanted ? rows : wanted;
    size_t d = (size_t)c->dim, f = (size_t)c->ffn_dim, hd = (size_t)c->head_dim;
    size_t h = (size_t)c->n_heads, kv = (size_t)c->n_kv_heads, v = (size_t)c->vocab_size;
    const struct buffer lines[N_BUFFERS] = {
        {&a->x, 4 * rows * d, false},
        {&a->normed, 4 * most * d, false},
        {&a->qkv, 4 * rows * (h + 2 * kv) * hd, false},
        {&a->mixed, 4 * rows * h * hd, false},
        {&a->gate_up, 4 * rows * 2 * f, false},
        {&a->hidden, 4 * rows * f, false},
        {&a->angles, 4 * rows * hd, false},
        {&a->last, 4 * wanted * d, false},
        {&a->logits, 4 * wanted * v, false},
        {&a->inv_freq, 4 * (hd / 2), false},
        {&a->token, 4 * rows, false},
        {&a->slot, 4 * rows, false},
        {&a->pos, 4 * rows, false},
        {&a->wanted, 4 * wanted, false},
        {&s->host_logits, s->kernels->host_memory ? 1 : 4 * wanted * v, true},
        {&s->slots, (size_t)s->info.n_slots * sizeof *s->slots, true},
        {&s->shared, (size_t)s->info.n_slots * sizeof *s->shared, true},
        {&s->drafts, (size_t)s->info.n_slots * sizeof(struct draft *), true},
        {&r->token, 4 * rows, true},
        {&r->slot, 4 * rows, true},
        {&r->pos, 4 * rows, true},
        {&r->spans, rows * sizeof *r->spans, true},
        {&r->wanted, 4 * wanted, true},
        {&r->wanted_by, wanted * sizeof(struct sequence *), true},
        {&r->params, wanted * sizeof *r->params, true},
        {&r->forbidden, wanted * MOST_FORBIDDEN * sizeof *r->forbidden, true},
        {&r->drawn, wanted * sizeof *r->drawn, true},
        {&p->block_max, samplers * 4 * (v / SAMPLER_BLOCK + 1), true},
        {&p->scaled, samplers * 4 * v, true},
        {&p->heap, samplers * 4 * v, true},
        {&p->ranked, samplers * 4 * v, true},
        {&p->mass, samplers * 8 * v, true},
    };
    memcpy(table, lines, sizeof lines);
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
            s->kernels->free(s->backend, data, table[i].n_bytes);
        }
        data = NULL;
        memcpy(table[i].at, &data, sizeof data);
    }
}

int check_memory(size_t n_bytes, const char *what, struct bpo_error *err) {
    size_t available = memory_available();
    if (n_bytes <= available) {
        return 0;
    }
    return bpo_fail(err, BPO_ERR_RESOURCE, "lower --max-new-tokens or -n, or free some memory",
                    "not enough memory: %s would need %.1f MiB, %.1f MiB are available", what,
                    (double)n_bytes / 1048576.0, (double)available / 1048576.0);
}

int session_memory(struct bpo_session *s, struct bpo_error *err) {
    struct buffer table[N_BUFFERS];
    session_buffers(s, table);
    size_t on_host = 0; /* bytes of the host's memory: on the CPU, all */
    s->info.buffer_bytes = 0;
    for (size_t i = 0; i < N_BUFFERS; i++) {
        s->info.buffer_bytes += table[i].n_bytes;
        on_host += table[i].on_host || s->kernels->host_memory ? table[i].n_bytes : 0;
    }
    int failed = check_memory(on_host, "the activations", err);
    for (size_t i = 0; i < N_BUFFERS && !failed; i++) {
        const struct buffer *b = &table[i];
        void *data = b->on_host ? calloc(1, b->n_bytes)
                                : s->kernels->alloc(s->backend, b->n_bytes, MEMORY_BUFFER, err);
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

/* The weights' matrices where the backend has them: the CPU reads the mapped file, a GPU its own
 * copy. */
int session_weights(struct bpo_session *s, struct bpo_error *err) {
    size_t n_layers = (size_t)s->model->info.n_layers, n_file;
    const uint8_t *file = safetensors_bytes(s->model->file, &n_file);
    const uint8_t *base = s->kernels->load_weights(s->backend, file, n_file, err);
    struct layer *layers = calloc(n_layers, sizeof *layers);
    if (!base || !layers) {
        free(layers);
        return base ? out_of_memory(err, "the list of layers", n_layers * sizeof *layers)
                    : BPO_ERR_RESOURCE;
    }
    s->weights = s->model->weights;
    s->weights.layers = layers;
    memcpy(layers, s->model->weights.layers, n_layers * sizeof *layers);
    struct weight *others[] = {&s->weights.embedding, &s->weights.norm, &s->weights.lm_head};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        others[i]->data = base + ((const uint8_t *)others[i]->data - file);
    }
    for (size_t l = 0; l < n_layers; l++) {
        struct weight *each = (struct weight *)&layers[l]; /* a layer is six of them */
        for (size_t i = 0; i < sizeof *layers / sizeof *each; i++) {
            each[i].data = base + ((const uint8_t *)each[i].data - file);
        }
    }
    return 0;
}

int session_rope(struct bpo_session *s, struct bpo_error *err) {
    size_t n_bytes = (size_t)s->model->info.head_dim / 2 * sizeof(float);
    float *inv_freq = malloc(n_bytes);
    if (!inv_freq) {
        return out_of_memory(err, "RoPE's frequencies", n_bytes);
    }
    rope_inv_freq(inv_freq, s->model->info.head_dim, (float)s->model->info.rope_theta);
    int failed = s->kernels->upload(s->backend, s->act.inv_freq, inv_freq, n_bytes, err);
    free(inv_freq);
    return failed;
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
    if (o->lookup < -1 || o->lookup > LOOKUP_MOST) {
        return bpo_fail(err, BPO_ERR_USAGE, "leave --lookup out to have what pays",
                        "%d drafted tokens; expected 0 to %d", o->lookup, LOOKUP_MOST);
    }
    if (o->n_positions != 0 && (o->n_positions < 2 || o->n_positions > c->max_positions)) {
        return bpo_fail(err, BPO_ERR_USAGE, "leave --context out to have all of them",
                        "a context of %d positions; this model has 2 to %d", o->n_positions,
                        c->max_positions);
    }
    return 0;
}

static void session_backend_info(struct bpo_session_info *info, const struct kernels *k,
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
    session_backend_info(info, k, b);
    k->destroy(b);
    return 0;
}

int session_backend(struct bpo_session *s, const struct bpo_session_options *o,
                    const struct kernels *kernels, struct bpo_error *err) {
    const struct backend_options options = {.n_threads =
                                                o->n_threads ? o->n_threads : threads_default(),
                                            .matmul = o->matmul,
                                            .progress = o->progress,
                                            .user = o->user};
    s->kernels = kernels;
    s->backend = s->kernels->create(&options, err);
    if (!s->backend) {
        return BPO_ERR_RESOURCE;
    }
    struct backend_info found;
    s->kernels->info(s->backend, &found);
    memcpy(s->numerics, found.numerics, sizeof s->numerics);
    session_backend_info(&s->info, s->kernels, s->backend);
    return 0;
}

void session_release(struct bpo_session *s) {
    if (s->backend) {
        session_free_buffers(s);
        if (s->kv.data) {
            s->kernels->free(s->backend, s->kv.data, s->kv_bytes);
        }
        s->kernels->destroy(s->backend);
    }
    s->backend = NULL;
    s->kv.data = NULL;
    free(s->weights.layers);
    s->weights.layers = NULL;
}

void bpo_session_get_info(const struct bpo_session *session, struct bpo_session_info *info) {
    *info = session->info;
}
