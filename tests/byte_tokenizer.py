"""A tokenizer whose ids are bytes, so that tests can say by hand what a text becomes."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, TURN = 256, 257
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no role tool') }}{% endif %}"
    "<turn>{{ m['role'][0] }}:{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>a:{% endif %}"
)
MARKED = (
    "{% for m in messages %}<turn>{{ m['role'][0] }}:{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<end>{% endgeneration %}{% else %}{{ m['content'] }}<end>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>a:{% endif %}"
)
# drops what an earlier answer holds in front of a `|`, as templates of reasoning models do
FORGETFUL = TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content'].split('|')[-1] if not loop.last else m['content'] }}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Make a tokenizer: ids 0..255 are bytes, 256 is `<end>` (the EOS), 257 is `<turn>`."""
    symbols = [chr(byte) if chr(byte) in "".join(pre_tokenizers.ByteLevel.alphabet()) else None for byte in range(256)]
    spare = iter(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {symbol for symbol in symbols if symbol}))
    vocabulary = {symbol or next(spare): byte for byte, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<turn>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=template)


def ids(text: str) -> list[int]:
    """Return the token ids of a text, derived apart from the tokenizer."""
    found = []
    while text:
        for special, number in (("<end>", END), ("<turn>", TURN)):
            if text.startswith(special):
                found.append(number)
                text = text.removeprefix(special)
                break
        else:
            found += text[0].encode()
            text = text[1:]
    return found
