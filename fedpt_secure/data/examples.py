"""Records to token ids: what a model reads, and from which position on it is judged."""

from __future__ import annotations

from dataclasses import dataclass

from fedpt_secure.data.records import Record
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of the large model's ids.

    Attributes:
        ids: `ids[0]` is the separator that opens every sequence; at least 2 ids, at most the context length.
        loss_from: the first position that is predicted with loss, at least 1 and below `len(ids)`; all later
        positions are.
    """

    ids: tuple[int, ...]
    loss_from: int


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """How a prompt and a response are put into one sequence: separator, opening, prompt, turn, response, end.

    Attributes:
        opening: ids between the separator and the prompt.
        turn: ids between the prompt and the response.
        end: ids after the response; they are predicted with loss, so the model learns to stop.
    """

    opening: tuple[int, ...]
    turn: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> PairTemplate:
        """The chat format where the vocabulary has it, else plain text.

        With `<|im_start|>` and `<|im_end|>` (SmolLM2, Qwen):

            <|im_start|>user\\n{prompt}<|im_end|>\\n<|im_start|>assistant\\n{response}<|im_end|>

        without a system message; else `{prompt}\\n\\n{response}` and the separator as the end.
        """
        start, stop = tokenizer.control_id("<|im_start|>"), tokenizer.control_id("<|im_end|>")
        if start is None or stop is None:
            return cls(opening=(), turn=tuple(tokenizer.ids("\n\n")), end=(tokenizer.separator_id,))
        return cls(
            opening=(start, *tokenizer.ids("user\n")),
            turn=(stop, *tokenizer.ids("\n"), start, *tokenizer.ids("assistant\n")),
            end=(stop,),
        )


def encode(
    record: Record, tokenizer: TextTokenizer, *, context_length: int, template: PairTemplate | None = None
) -> Example:
    """Token ids of a record, cut to the context length.

    Plain text: separator and text; loss on every token of the text; what does not fit is cut at the end.

    A pair: as `PairTemplate` says; loss on the response and the end. If both parts do not fit, the prompt loses its
    beginning, but keeps half of the room as long as it needs it; then the response is cut at the end, its end token
    with it.

    **Guarantees.** The ids depend on the record and the settings alone. No text becomes a control token. Prompt and
    response are encoded apart, so the border of the loss falls between two tokens.

    Args:
        record: not blank.
        tokenizer: of the large model.
        context_length: most ids in the sequence, the separator included.
        template: for pairs; `PairTemplate.of(tokenizer)` if None.

    Raises:
        ConfigError: the context has no room for one token of text beside the fixed ones.
        DataError: the text encodes to nothing, so there is no position to predict.
    """
    # More text than this cannot reach into the context; a record of a hundred megabytes is not tokenized for 128 ids.
    reach = context_length * tokenizer.longest_token
    separator = (tokenizer.separator_id,)
    text = tuple(tokenizer.ids(record.text[:reach]))
    if not text:
        raise DataError("a record encodes to no tokens, so nothing of it can be predicted", hint="leave empty text out")
    if not record.prompt:
        _check_room(context_length, len(separator))
        return Example(ids=(separator + text)[:context_length], loss_from=1)

    template = template or PairTemplate.of(tokenizer)
    prompt = tuple(tokenizer.ids(record.prompt[-reach:]))
    answer = text + template.end
    fixed = len(separator) + len(template.opening) + len(template.turn)
    _check_room(context_length, fixed)
    room = context_length - fixed
    kept_prompt = min(len(prompt), max(room - len(answer), room // 2))
    before = separator + template.opening + prompt[len(prompt) - kept_prompt :] + template.turn
    return Example(ids=(before + answer)[:context_length], loss_from=len(before))


def _check_room(context_length: int, fixed: int) -> None:
    if context_length <= fixed:
        raise ConfigError(
            f"a context of {context_length} tokens has no room for text beside the {fixed} fixed ones",
            hint="raise the context length",
        )
