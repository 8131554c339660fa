"""Makes small tokenizers of the kinds that treat the beginning of a text, blanks or case in ways
of their own. Needs `pip install tokenizers`; run it in this folder.
"""
import pathlib

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [path.read_text(encoding="utf-8") for path in sorted(pathlib.Path("../../../docs").rglob("*.md"))]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]


def extras(tok):
    tok.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True), AddedToken("<end>x", special=True)])
    tok.add_special_tokens([AddedToken("<end>", rstrip=True, special=True)])
    tok.add_tokens([AddedToken("word", single_word=True, normalized=False), AddedToken("Normal Ised", normalized=True)])


def bos(tok, *around):
    single = " ".join(around)
    special = [(name, tok.token_to_id(name)) for name in around if name != "$A"]
    tok.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def save(tok, name):
    extras(tok)
    tok.save(f"{name}.json", pretty=False)


tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
tok.train_from_iterator(TEXTS[:4], trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, max_token_length=8))
bos(tok, "<s>", "$A")
save(tok, "metaspace_first")

tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
tok.train_from_iterator(TEXTS[:4], trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, max_token_length=8))
bos(tok, "<s>", "$A")
save(tok, "prepend")

tok = Tokenizer(models.WordPiece(unk_token="<unk>"))
tok.normalizer = normalizers.BertNormalizer(lowercase=True)
tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
tok.train_from_iterator(TEXTS[:4], trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL))
bos(tok, "<s>", "$A", "</s>")
save(tok, "wordpiece")

tok = Tokenizer(models.Unigram())
tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
tok.train_from_iterator(TEXTS[:4], trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>"))
save(tok, "unigram")
