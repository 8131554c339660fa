#!/usr/bin/env python3
"""Makes a tiny Qwen2 with random weights, a small byte-level BPE tokenizer and a ChatML template.

    tiny_model.py DIR

The tokenizer is trained on the interpreter's own standard library, so that nothing has to be
fetched. Seeds are fixed.
"""

import glob
import os
import sys

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if not (loop.first and m.role == 'system') %}
        {{- '<|im_start|>' + m.role + '\\n' + (m.content if m.content else '') }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def tokenizer():
    files = sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py")))[:120]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train(files, trainers.BpeTrainer(
        vocab_size=1920, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet))
    bpe.add_tokens([AddedToken(text, normalized=False, special=False) for text in ADDED])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:], model_max_length=8192, clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATE
    return fast


def main():
    folder = sys.argv[1]
    tokens = tokenizer()
    tokens.save_pretrained(folder)
    torch.manual_seed(20251121)
    rows = (len(tokens) + 63) // 64 * 64
    end = tokens.convert_tokens_to_ids("<|im_end|>")
    # Attention on CPUs has kernels for few sizes of heads; 32 is the smallest.
    config = Qwen2Config(
        vocab_size=rows, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8192, rope_theta=10000.0, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=end, pad_token_id=0, initializer_range=0.35, torch_dtype="float32")
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        # Rows that are no token of a text must never win: answers are as long as asked for.
        for row in [*range(len(tokens), rows), 0, 1, 2]:
            model.lm_head.weight[row].zero_()
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0)
    model.save_pretrained(folder, safe_serialization=True)


main()
