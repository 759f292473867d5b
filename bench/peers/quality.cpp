// Scores llama.cpp's formats on given windows of token ids. Two uses:
//
//   quality tokenize MODEL TEXT WINDOW COUNT          -> {"windows": [[ids ..], ..]} on stdout
//   quality score THREADS REFERENCE MODEL < windows   -> one JSON object on stdout
//
// `windows` is plain text: the number of windows, then for each its length and its ids. A window is decoded from an empty KV
// cache; the logits at positions 0 .. n-2 are scored against the tokens at 1 .. n-1: every position after the first.
// KL is KL(reference || model) in nats. The reference runs with an f32 KV cache and without flash attention, the model with
// llama-server's defaults (f16, flash attention).

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static void fail(const std::string & what) {
    fprintf(stderr, "quality: %s\n", what.c_str());
    exit(1);
}

static llama_model * open_model(const char * path, bool vocabulary_only) {
    auto params = llama_model_default_params();
    params.vocab_only = vocabulary_only;
    llama_model * model = llama_model_load_from_file(path, params);
    if (!model) fail(std::string("cannot load ") + path);
    return model;
}

static int tokenize(char ** arguments) {
    llama_model * model = open_model(arguments[0], true);
    std::ifstream file(arguments[1]);
    std::stringstream text;
    text << file.rdbuf();
    const std::string all = text.str();
    const size_t window = strtoul(arguments[2], nullptr, 10), count = strtoul(arguments[3], nullptr, 10);
    std::vector<llama_token> ids(all.size() + 8);
    const int found = llama_tokenize(llama_model_get_vocab(model), all.c_str(), all.size(), ids.data(), ids.size(), false, false);
    if (found < 0 || size_t(found) < window * count) fail("the text has only " + std::to_string(found) + " tokens");
    printf("{\"windows\": [");
    for (size_t at = 0; at < window * count; at++) {
        const bool first = at % window == 0, last = at % window == window - 1;
        printf("%s%s%d%s", first && at ? ", " : "", first ? "[" : ", ", ids[at], last ? "]" : "");
    }
    printf("]}\n");
    return 0;
}

struct Subject {
    llama_context * context;
    int vocabulary;

    Subject(const char * path, int threads, int longest, bool reference) {
        llama_model * model = open_model(path, false);
        auto params = llama_context_default_params();
        params.n_ctx = longest;
        params.n_batch = params.n_ubatch = longest;
        params.n_threads = params.n_threads_batch = threads;
        if (reference) {
            // Flash attention would cast an f32 cache to f16 again.
            params.type_k = params.type_v = GGML_TYPE_F32;
            params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        }
        context = llama_init_from_model(model, params);
        if (!context) fail("no context");
        vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    }

    void decode(const std::vector<llama_token> & ids) {
        llama_memory_clear(llama_get_memory(context), true);
        llama_batch batch = llama_batch_init(ids.size(), 0, 1);
        batch.n_tokens = ids.size();
        for (size_t i = 0; i < ids.size(); i++) {
            batch.token[i] = ids[i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = true;
        }
        if (llama_decode(context, batch) != 0) fail("decode failed");
        llama_batch_free(batch);
    }

    // Log-probabilities at position `at`; returns the likeliest token.
    int log_probabilities(int at, std::vector<double> & out) const {
        const float * logits = llama_get_logits_ith(context, at);
        const int best = std::max_element(logits, logits + vocabulary) - logits;
        double sum = 0;
        for (int i = 0; i < vocabulary; i++) sum += std::exp(double(logits[i]) - logits[best]);
        const double norm = logits[best] + std::log(sum);
        out.resize(vocabulary);
        for (int i = 0; i < vocabulary; i++) out[i] = logits[i] - norm;
        return best;
    }
};

static int score(char ** arguments) {
    std::vector<std::vector<llama_token>> windows;
    size_t count = 0, length = 0, longest = 0;
    std::cin >> count;
    for (size_t w = 0; w < count && std::cin >> length; w++) {
        windows.emplace_back(length);
        for (auto & id : windows.back()) std::cin >> id;
        longest = std::max(longest, length);
    }
    if (!std::cin || windows.size() != count || longest < 2) fail("the windows on stdin are not whole");
    const int threads = atoi(arguments[0]);
    Subject reference(arguments[1], threads, longest, true), model(arguments[2], threads, longest, false);
    std::vector<double> p, q, kls;
    double surprise = 0, reference_surprise = 0;
    size_t same = 0;
    for (auto & ids : windows) {
        reference.decode(ids);
        model.decode(ids);
        for (size_t at = 0; at + 1 < ids.size(); at++) {
            same += reference.log_probabilities(at, p) == model.log_probabilities(at, q);
            double kl = 0;
            for (size_t i = 0; i < p.size(); i++) kl += std::exp(p[i]) * (p[i] - q[i]);
            kls.push_back(kl);
            surprise -= q[ids[at + 1]];
            reference_surprise -= p[ids[at + 1]];
        }
        fprintf(stderr, ".");
    }
    const double n = kls.size();
    double mean = 0, variance = 0;
    for (double kl : kls) mean += kl / n;
    for (double kl : kls) variance += (kl - mean) * (kl - mean) / (n - 1);
    std::sort(kls.begin(), kls.end());
    printf("{\"positions\": %zu, \"kl_mean\": %.9g, \"kl_error\": %.3g, \"kl_p99\": %.6g, \"top1_agreement\": %.6f, "
           "\"perplexity\": %.6f, \"reference_perplexity\": %.6f}\n",
           kls.size(), mean, std::sqrt(variance / n), kls[size_t(0.99 * (n - 1))], same / n, std::exp(surprise / n), std::exp(reference_surprise / n));
    return 0;
}

int main(int count, char ** arguments) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    if (count == 6 && !strcmp(arguments[1], "tokenize")) return tokenize(arguments + 2);
    if (count == 5 && !strcmp(arguments[1], "score")) return score(arguments + 2);
    fail("usage: quality tokenize MODEL TEXT WINDOW COUNT | quality score THREADS REFERENCE MODEL < windows");
}
