// How the structures of the interface are laid out, in words.
#include <cstddef>
#include <initializer_list>
#include <string>

#include "calls.h"

namespace kvc {
namespace {

struct Field {
    const char *name;
    size_t offset, size;
};

std::string line(const char *name, size_t size, std::initializer_list<Field> fields) {
    std::string text = name;
    text += " " + std::to_string(size) + ":";
    const char *before = " ";
    for (const Field &field : fields) {
        text += before;
        text += field.name;
        text += " " + std::to_string(field.offset) + " " + std::to_string(field.size);
        before = ", ";
    }
    return text + "\n";
}

#define KVC_FIELD(name) {#name, offsetof(S, name), sizeof(S::name)}

std::string all_lines() {
    std::string text;
    {
        using S = kvc_piece;
        text += line("kvc_piece", sizeof(S),
                     {KVC_FIELD(quad), KVC_FIELD(weight), KVC_FIELD(word), KVC_FIELD(first),
                      KVC_FIELD(bits)});
    }
    {
        using S = kvc_head_table;
        text += line("kvc_head_table", sizeof(S),
                     {KVC_FIELD(capacity), KVC_FIELD(exceptions), KVC_FIELD(words),
                      KVC_FIELD(pieces), KVC_FIELD(components), KVC_FIELD(stride), KVC_FIELD(piece),
                      KVC_FIELD(mean), KVC_FIELD(forward), KVC_FIELD(inverse), KVC_FIELD(cost),
                      KVC_FIELD(fields), KVC_FIELD(v_bits), KVC_FIELD(weight), KVC_FIELD(step),
                      KVC_FIELD(middle), KVC_FIELD(v_step), KVC_FIELD(reserved)});
    }
    {
        using S = kvc_table;
        text += line("kvc_table", sizeof(S),
                     {KVC_FIELD(local), KVC_FIELD(positions), KVC_FIELD(heads), KVC_FIELD(coarse),
                      KVC_FIELD(fine)});
    }
    {
        using S = kvc_layer;
        text += line(
            "kvc_layer", sizeof(S),
            {KVC_FIELD(pool), KVC_FIELD(num_blocks), KVC_FIELD(page_bytes), KVC_FIELD(block_pages),
             KVC_FIELD(first_page), KVC_FIELD(block_size), KVC_FIELD(num_kv_heads),
             KVC_FIELD(num_heads), KVC_FIELD(k_size), KVC_FIELD(v_size), KVC_FIELD(dtype),
             KVC_FIELD(scale), KVC_FIELD(reserved), KVC_FIELD(tables)});
    }
    {
        using S = kvc_directory;
        text += line("kvc_directory", sizeof(S),
                     {KVC_FIELD(begin), KVC_FIELD(end), KVC_FIELD(stride), KVC_FIELD(size),
                      KVC_FIELD(page), KVC_FIELD(count), KVC_FIELD(codec), KVC_FIELD(bias),
                      KVC_FIELD(log_bias), KVC_FIELD(log_bias_size)});
    }
    {
        using S = kvc_batch;
        text += line("kvc_batch", sizeof(S),
                     {KVC_FIELD(num_seqs), KVC_FIELD(query_start), KVC_FIELD(tail_length),
                      KVC_FIELD(tail_table), KVC_FIELD(tail_stride), KVC_FIELD(directory)});
    }
    {
        using S = kvc_source;
        text += line("kvc_source", sizeof(S),
                     {KVC_FIELD(directory), KVC_FIELD(tail_table), KVC_FIELD(tail_length),
                      KVC_FIELD(tail_position)});
    }
    {
        using S = kvc_scoring;
        text += line("kvc_scoring", sizeof(S),
                     {KVC_FIELD(window), KVC_FIELD(pool), KVC_FIELD(pool_max), KVC_FIELD(reduce),
                      KVC_FIELD(factor)});
    }
    {
        using S = kvc_keys;
        text += line("kvc_keys", sizeof(S),
                     {KVC_FIELD(data), KVC_FIELD(stride), KVC_FIELD(heads), KVC_FIELD(size),
                      KVC_FIELD(slots)});
    }
    return text;
}

}  // namespace

const char *structs() {
    static const std::string text = all_lines();
    return text.c_str();
}

}  // namespace kvc
