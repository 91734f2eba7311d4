"""Writes a BERT model for embeddings, as its authors publish it, as a file of llama.cpp's (GGUF, version 3)."""

import json
import struct

ALIGNED = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
NORMAL, CONTROL = 1, 3  # kinds of tokens
MEAN = 1  # a text's vector is the mean of those of its tokens

NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def named(name):
    """llama.cpp's name of a tensor; None for what it has no use for."""
    stem, _, of = name.rpartition(".")
    if stem.startswith("encoder.layer."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{of}"
    return f"{NAMES[stem]}.{of}" if stem in NAMES else None


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind, item):
    return string(item) if kind == STRING else struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], item)


def pair(key, kind, item):
    if isinstance(item, list):
        head = struct.pack("<IIQ", ARRAY, kind, len(item))
        return string(key) + head + b"".join(value(kind, one) for one in item)
    return string(key) + struct.pack("<I", kind) + value(kind, item)


def vocabulary(text):
    """The tokens as llama.cpp writes them, each that begins a word with a mark, and what kind each is of."""
    words = text.removesuffix("\n").split("\n")
    is_control = [word.startswith("[") and word.endswith("]") for word in words]
    tokens = [
        word if control else word[2:] if word.startswith("##") else "\u2581" + word
        for word, control in zip(words, is_control)
    ]
    return words, tokens, [CONTROL if control else NORMAL for control in is_control]


def pairs(config, vocab):
    words, tokens, kinds = vocabulary(vocab)
    special = {"bos": "[CLS]", "eos": "[SEP]", "unknown": "[UNK]", "seperator": "[SEP]", "padding": "[PAD]", "mask": "[MASK]"}
    return [
        ("general.architecture", STRING, "bert"),
        ("general.name", STRING, "all-MiniLM-L6-v2"),
        ("general.file_type", UINT32, 0),
        ("bert.context_length", UINT32, config["max_position_embeddings"]),
        ("bert.embedding_length", UINT32, config["hidden_size"]),
        ("bert.feed_forward_length", UINT32, config["intermediate_size"]),
        ("bert.block_count", UINT32, config["num_hidden_layers"]),
        ("bert.attention.head_count", UINT32, config["num_attention_heads"]),
        ("bert.attention.layer_norm_epsilon", FLOAT32, config["layer_norm_eps"]),
        ("bert.attention.causal", BOOL, False),
        ("bert.pooling_type", UINT32, MEAN),
        ("tokenizer.ggml.model", STRING, "bert"),
        ("tokenizer.ggml.pre", STRING, "default"),
        ("tokenizer.ggml.token_type_count", UINT32, config["type_vocab_size"]),
        ("tokenizer.ggml.tokens", STRING, tokens),
        ("tokenizer.ggml.token_type", INT32, kinds),
        *((f"tokenizer.ggml.{name}_token_id", UINT32, words.index(word)) for name, word in special.items()),
    ]


def convert(archive, folder, out):
    """archive: a zip file with `config.json`, `vocab.txt` and `model.safetensors` in a folder, its numbers of 32 bits."""
    config = json.loads(archive.read(f"{folder}/config.json"))
    weights = archive.read(f"{folder}/model.safetensors")
    (length,) = struct.unpack_from("<Q", weights)
    listed = json.loads(weights[8 : 8 + length])
    tensors = [(named(name), entry) for name, entry in sorted(listed.items()) if name != "__metadata__"]
    tensors = [(name, entry) for name, entry in tensors if name and entry["dtype"] == "F32"]
    known = pairs(config, archive.read(f"{folder}/vocab.txt").decode())
    head, at = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(known)), 0
    head += b"".join(pair(*one) for one in known)
    for name, entry in tensors:
        shape, (start, end) = entry["shape"][::-1], entry["data_offsets"]
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, at)
        at += (end - start + ALIGNED - 1) // ALIGNED * ALIGNED
    out.write(head + bytes(-len(head) % ALIGNED))
    for _, entry in tensors:
        start, end = entry["data_offsets"]
        out.write(weights[8 + length + start : 8 + length + end] + bytes(-(end - start) % ALIGNED))
