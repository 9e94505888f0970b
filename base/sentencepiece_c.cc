// sentencepiece_c.cc - see sentencepiece_c.h.
#include "base/sentencepiece_c.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include <sentencepiece_processor.h>

struct spm {
    sentencepiece::SentencePieceProcessor processor;
};

namespace {

// Runs f, which returns a status, and turns an exception into a status too.
template <typename F> enum spm_status guarded(F &&f) noexcept {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return SPM_NO_MEMORY;
    } catch (...) {
        return SPM_FAILED;
    }
}

// The same for queries about a piece, which return a neutral value on failure.
template <typename T, typename F> T guarded_value(T otherwise, F &&f) noexcept {
    try {
        return f();
    } catch (...) {
        return otherwise;
    }
}

} // namespace

extern "C" enum spm_status spm_open(struct spm **spm, const void *model, size_t n_bytes,
                                    char *message, size_t message_size) {
    *spm = nullptr;
    std::snprintf(message, message_size, "the library failed");
    struct spm *made = nullptr;
    enum spm_status result = guarded([&] {
        made = new struct spm;
        const auto status = made->processor.LoadFromSerializedProto(
            std::string_view(static_cast<const char *>(model), n_bytes));
        if (!status.ok()) {
            std::snprintf(message, message_size, "%s", status.ToString().c_str());
            return SPM_FAILED;
        }
        return SPM_OK;
    });
    if (result != SPM_OK) {
        spm_close(made);
        return result;
    }
    *spm = made;
    return SPM_OK;
}

extern "C" void spm_close(struct spm *spm) {
    delete spm;
}

extern "C" int32_t spm_count(const struct spm *spm) {
    return guarded_value(0, [&] { return spm->processor.GetPieceSize(); });
}

extern "C" const char *spm_piece(const struct spm *spm, int32_t id, size_t *n) {
    *n = 0;
    return guarded_value("", [&] {
        const std::string &piece = spm->processor.IdToPiece(id);
        *n = piece.size();
        return piece.data();
    });
}

extern "C" bool spm_is_control(const struct spm *spm, int32_t id) {
    return guarded_value(true, [&] { return spm->processor.IsControl(id); });
}

extern "C" bool spm_is_unknown(const struct spm *spm, int32_t id) {
    return guarded_value(true, [&] { return spm->processor.IsUnknown(id); });
}

extern "C" bool spm_is_byte(const struct spm *spm, int32_t id) {
    return guarded_value(false, [&] { return spm->processor.IsByte(id); });
}

extern "C" enum spm_status spm_encode(const struct spm *spm, const char *text, size_t n_text,
                                      int32_t **ids, size_t *n_ids) {
    *ids = nullptr;
    *n_ids = 0;
    return guarded([&] {
        // The view has an explicit length, so NUL is a byte like any other.
        std::vector<int> found;
        if (!spm->processor.Encode(std::string_view(text, n_text), &found).ok()) {
            return SPM_FAILED;
        }
        if (found.empty()) {
            return SPM_OK;
        }
        static_assert(sizeof(int) == sizeof(int32_t), "the ids are copied as they are");
        *ids = static_cast<int32_t *>(std::malloc(found.size() * sizeof **ids));
        if (!*ids) {
            return SPM_NO_MEMORY;
        }
        std::memcpy(*ids, found.data(), found.size() * sizeof **ids);
        *n_ids = found.size();
        return SPM_OK;
    });
}

extern "C" enum spm_status spm_decode(const struct spm *spm, const int32_t *ids, size_t n_ids,
                                      char **text, size_t *n_text) {
    *text = nullptr;
    *n_text = 0;
    return guarded([&] {
        std::string found;
        if (!spm->processor.Decode(std::vector<int>(ids, ids + n_ids), &found).ok()) {
            return SPM_FAILED;
        }
        *text = static_cast<char *>(std::malloc(found.size() + 1));
        if (!*text) {
            return SPM_NO_MEMORY;
        }
        std::memcpy(*text, found.c_str(), found.size() + 1);
        *n_text = found.size();
        return SPM_OK;
    });
}
