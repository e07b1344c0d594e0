"""lm-eval's transformers model that counts truncated prompts, refuses NaN and computes shared prefixes once."""

import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from types import SimpleNamespace

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..messages import one_line
from .batches import Batch, Unit, plan
from .processes import Team

# Fields in which configurations keep the longest input, in order of preference.
LENGTH_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "model_max_length",
)  # fmt: skip
PORTION = 64  # tokens that are generated before finished rows are dropped from a batch
UNLIMITED = 10**9  # tokenizers without a limit give a huge number


class CausalLM(HFLM):
    """HFLM that counts the prompts it cuts, and computes once what requests share.

    For likelihoods, a context goes through the model once for all its answers, and the head computes the logits of
    scored tokens only. Contexts with a common prefix, also of generated answers, continue from one state. On rank 0 of
    a `team`, the batches of a single process are distributed over all ranks; other ranks have no `team`.

    Attributes:
        counts: "tokens" through the model; "prompts_cut", the prompts cut from the left because they exceed the
            context; "answers_short", the answers with less room than the token limit. The driver clears them.
        batch_sizes_found: sizes found for the batch size "auto". The driver clears them.
        bar: makes the progress bar of a number of requests, given as `total`.
    """

    def __init__(self, model, tokenizer, max_length: int, batch_size: int | str, team: Team | None = None):
        self._team = team
        self.counts: Counter[str] = Counter()
        self.batch_sizes_found: list[int] = []
        self.bar = partial(tqdm, disable=True)
        self._room = 0
        self._prefix: tuple[int, ...] = ()  # of the batch that is being generated
        self._state: tuple[tuple[int, ...], object] = ((), None)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=max_length, batch_size=batch_size,
            prefix_token_id=next((token for token in ends if token is not None), None),
        )  # fmt: skip

    @property
    def max_length(self) -> int:
        # lm-eval cuts prompts so that the token limit always fits, and fails if nothing is left of the prompt. During
        # generation it sees as much more room as it will ask for: prompts stay whole, answers get the remaining room.
        return self._max_length + self._room

    @cached_property
    def _accepts(self) -> set[str]:
        """The arguments of the model's forward pass; models with remote code may lack some."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return set(inspect.signature(base.forward).parameters)

    @cached_property
    def _layers(self) -> set[type]:
        """The types of the model's cache layers; empty if a forward pass cannot continue from a state."""
        if not {"attention_mask", "past_key_values", "use_cache", "position_ids"} <= self._accepts:
            return set()
        token = torch.tensor([[self.prefix_token_id]], device=self.device)
        with torch.no_grad():
            state = getattr(self.model(token, use_cache=True), "past_key_values", None)
        return {type(layer) for layer in state.layers} if isinstance(state, Cache) else set()

    @property
    def _goes_on(self) -> bool:
        """Whether answers are scored from the state after their context.

        This needs pure attention: the chunks of linear attention would start elsewhere, which changes the rounding.
        """
        return bool(self._layers) and self._layers <= {DynamicLayer, DynamicSlidingWindowLayer}

    @property
    def _shares(self) -> bool:
        """Whether padding may stand between prefix and prompt, which only full attention ignores."""
        return self._layers == {DynamicLayer}

    def tok_decode(self, tokens, skip_special_tokens=True):
        # lm-eval decodes the end token to stop at it; a tokenizer may have none.
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)

    def generate_until(self, requests, disable_tqdm=False):
        limit = max(request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests)
        kinds: dict[str, list[Unit]] = {}
        for number, request in enumerate(requests):
            context = tuple(self.tok_encode(request.args[0]))
            self.counts["prompts_cut"] += len(context) > self._max_length - 1
            self.counts["answers_short"] += len(context) + limit > self._max_length
            unit = Unit(context[-(self._max_length - 1) :], (number,))
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(unit)
        size = self.batch_size if self.batch_size != "auto" else self._detect_batch_size()
        batches = [batch for units in kinds.values() for batch in plan(units, size, self._shares)]
        return self._run("generate", [SimpleNamespace(args=request.args) for request in requests], batches, limit)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        contexts, answers, questions = [], [], defaultdict(list)
        for number, (_, context, answer) in enumerate(requests):
            if len(answer) > self._max_length:
                raise ValueError(
                    f"an answer to be scored has {len(answer)} tokens, more than the context of "
                    f"{self._max_length}: pass a larger --max-length, or leave the row out"
                )
            room = self._max_length + 1 - len(answer)
            self.counts["prompts_cut"] += len(context) > room
            contexts.append(tuple(context[-room:]))
            answers.append(tuple(answer))
            questions[contexts[-1]].append(number)
        size = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size([max(requests, key=lambda request: len(request[1]) + len(request[2]))])
        units = [unit for question in questions.items() for unit in _units(*question, answers, size)]
        return self._run("score", list(zip(contexts, answers, strict=True)), plan(units, size, self._shares), None)

    def _run(self, kind: str, items: Sequence, batches: list[Batch], limit: int | None) -> list:
        """Answers all batches; returns the answers in the order of the items."""
        work = [(batch.prefix, [items[number] for number in batch.members]) for batch in batches]
        answer_all = self._work if self._team is None else self._distribute
        answers = [None] * len(items)
        for batch, given in zip(batches, answer_all(kind, work, limit), strict=True):
            for number, each in zip(batch.members, given, strict=True):
                answers[number] = each
        return answers

    def _distribute(self, kind: str, batches: list, limit: int | None) -> list[list]:
        """Has every rank answer a share of the batches; returns the answers per batch."""
        size = self._team.size
        shares = [(kind, batches[rank::size], limit) for rank in range(size)]
        replies = self._team.call("answer", shares, lambda own: (self._work(*own), Counter()))
        answers: list[list] = [[] for _ in batches]
        for rank, (given, counts) in enumerate(replies):
            answers[rank::size] = given
            self.counts.update(counts)
        return answers

    def answer(self, share: tuple) -> tuple[list[list], Counter]:
        """Answers a share of the work on another rank than 0; returns the answers per batch and the counts."""
        self.counts.clear()
        answers = self._work(*share)
        return answers, Counter(self.counts)

    def _work(self, kind: str, batches: list[tuple[tuple[int, ...], list]], limit: int | None) -> list[list]:
        """Returns the answers per batch, where a batch is a prefix and its requests."""
        batch_size, self._room = self.batch_size_per_gpu, (limit or 1) - 1
        answers = []
        try:
            with self.bar(total=sum(len(requests) for _, requests in batches)) as bar:
                for prefix, requests in batches:
                    if kind == "score":
                        answers.append(self._score(prefix, requests))
                    else:
                        self._prefix, self.batch_size_per_gpu = prefix, len(requests)
                        answers.append(super().generate_until(requests, disable_tqdm=True))
                    bar.update(len(requests))
            return answers
        finally:
            self.batch_size_per_gpu, self._room, self._prefix = batch_size, 0, ()
            self._state = ((), None)

    def _detect_batch_size(self, requests=None, pos=0):
        found = super()._detect_batch_size(requests, pos)
        self.batch_sizes_found.append(found)
        return found

    @torch.no_grad()
    def _score(self, prefix: tuple[int, ...], requests: list[tuple]) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each answer to its context, and whether greedy decoding would give it."""
        contexts, answers = zip(*requests, strict=True)
        if self._goes_on:
            scored = self._score_from_state(prefix, contexts, answers)
        else:
            scored = self._score_whole(contexts, answers)
        results = []
        for answer, each in zip(answers, scored, strict=True):
            wanted = torch.tensor(answer, device=each.device)
            total = each.gather(1, wanted[:, None]).sum()
            results.append((float(total), bool((each.argmax(dim=-1) == wanted).all())))
        return results

    def _score_from_state(self, prefix: tuple[int, ...], contexts: list, answers: list) -> list[torch.Tensor]:
        """Returns the log-probabilities of each answer's tokens `[T, V]`; each context goes through the model once."""
        start = len(prefix)
        rows = {context: row for row, context in enumerate(dict.fromkeys(contexts))}
        row_of = [rows[context] for context in contexts]
        longer = [number for number, answer in enumerate(answers) if len(answer) > 1]
        tokens, mask = self._padded([context[start:] for context in rows], "left")
        state = self._state_after(prefix, len(rows))
        mask = torch.cat([mask.new_ones(len(rows), start), mask], dim=1)
        logits, state = self._forward(tokens, mask, state, 1, bool(longer))
        first = logits[:, -1].log_softmax(dim=-1)  # [R, V]
        scored = [first[row][None] for row in row_of]
        if longer:
            index = torch.tensor([row_of[number] for number in longer], device=self.device)
            state.reorder_cache(index)
            tokens, own = self._padded([answers[number][:-1] for number in longer], "right")
            logits, _ = self._forward(tokens, torch.cat([mask[index], own], dim=1), state, tokens.shape[1], False)
            rest = logits.log_softmax(dim=-1)  # [L, T, V]
            for place, number in enumerate(longer):
                scored[number] = torch.cat([scored[number], rest[place, : len(answers[number]) - 1]])
        return scored

    def _score_whole(self, contexts: list, answers: list) -> list[torch.Tensor]:
        """Returns the log-probabilities of each answer's tokens `[T, V]`, each read with its context."""
        whole = [context + answer[:-1] for context, answer in zip(contexts, answers, strict=True)]
        rows = {each: row for row, each in enumerate(dict.fromkeys(whole))}
        tokens, _ = self._padded(list(rows), "right")
        length = tokens.shape[1]
        kept = length - min(len(context) for context in contexts) + 1
        logits = self._forward(tokens, None, None, kept, None)[0].log_softmax(dim=-1)
        starts = [len(context) - 1 - (length - kept) for context in contexts]
        return [
            logits[rows[each], start : start + len(answer)]
            for each, start, answer in zip(whole, starts, answers, strict=True)
        ]

    def _forward(self, tokens, mask, state, kept: int, use_cache: bool | None) -> tuple[torch.Tensor, Cache | None]:
        """Returns the logits of the last `kept` tokens `[R, kept, V]`, and the state after all tokens.

        `tokens` is `[R, T]`, `state` the one after S tokens or None, and `mask` `[R, S + T]`, 1 for tokens and 0 for
        padding, or None. `use_cache` says whether to return a state; None for a model without this argument.
        """
        inputs = {"logits_to_keep": kept} if "logits_to_keep" in self._accepts else {}
        if use_cache is not None:
            inputs |= {"use_cache": use_cache or state is not None, "past_key_values": state}
        if mask is not None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -tokens.shape[1] :]
            inputs["attention_mask"] = None if mask.all() else mask  # faster kernels run without a mask
        output = self.model(tokens, **inputs)
        self.counts["tokens"] += tokens.numel()
        return _without_nan(output.logits[:, -kept:]), getattr(output, "past_key_values", None)

    def _state_after(self, prefix: tuple[int, ...], rows: int) -> Cache | None:
        """Returns the state of `rows` copies of the prefix, which goes through the model once."""
        if not prefix:
            return None
        if self._state[0] != prefix:
            tokens = torch.tensor([prefix], device=self.device)
            with torch.no_grad():
                self._state = (prefix, self._forward(tokens, torch.ones_like(tokens), None, 1, True)[1])
        state = copy.deepcopy(self._state[1])
        state.batch_repeat_interleave(rows)
        return state

    def _padded(self, sequences: list[tuple], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the padded tokens `[R, T]` and their mask `[R, T]`."""
        rows = [torch.tensor(each, dtype=torch.long) for each in sequences]
        pad = {"batch_first": True, "padding_side": side}
        tokens = pad_sequence(rows, padding_value=self.tokenizer.pad_token_id, **pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], **pad)
        return tokens.to(self.device), mask.to(self.device)

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        """Returns the contexts with their continuations: token ids `[R, T]`.

        Generates in portions and drops finished rows after each; lm-eval continues all rows until the last one stops.
        """
        max_length = min(max_length, self._max_length)
        mask = generation_kwargs.pop("attention_mask", torch.ones_like(context))
        context, mask, state = self._after_prefix(context, mask)
        start = context.shape[1]
        self.counts["tokens"] += context.numel() - len(self._prefix) * len(context)
        ended: dict[int, torch.Tensor] = {}
        rows, tokens = list(range(len(context))), context
        while rows:
            width = tokens.shape[1]
            portion = min(width + PORTION, max_length) if self._layers else max_length
            with _plain_greedy(self.model):
                output = super()._model_generate(
                    tokens, portion, stop, attention_mask=mask, past_key_values=state, return_dict_in_generate=True,
                    logits_processor=LogitsProcessorList([lambda _, scores: _without_nan(scores)]), **generation_kwargs,
                )  # fmt: skip
            tokens, state = output.sequences, output.past_key_values
            self.counts["tokens"] += (tokens.shape[1] - width) * len(rows)
            over = tokens.shape[1] < portion or portion == max_length  # all rows have ended or have no room left
            going = [place for place in range(len(rows)) if not over and not self._ended(tokens[place, start:], stop)]
            ended |= {row: tokens[place] for place, row in enumerate(rows) if place not in going}
            if going and len(going) < len(rows):
                state.reorder_cache(torch.tensor(going, device=self.device))
            mask = torch.cat([mask, mask.new_ones(len(rows), tokens.shape[1] - width)], dim=1)[going]
            rows, tokens = [rows[place] for place in going], tokens[going]
        continued = [ended[row] for row in range(len(context))]
        return pad_sequence(continued, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def _ended(self, answer: torch.Tensor, stop: list[str]) -> bool:
        """Returns whether an answer holds the end token or a text at which lm-eval cuts it off."""
        text = self.tok_decode(answer.tolist(), skip_special_tokens=False)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return any(part in text for part in stop if part) or any(token in ends for token in answer.tolist())

    def _after_prefix(self, context, mask) -> tuple[torch.Tensor, torch.Tensor, Cache | None]:
        """Moves the padding between prefix and prompt, at the same width, because lm-eval cuts answers by position.

        Returns tokens `[R, T]`, mask `[R, T]`, and the state after the prefix.
        """
        start = len(self._prefix)
        if not start:
            return context, mask, None
        prompts = [tuple(row[seen.bool()].tolist()) for row, seen in zip(context, mask, strict=True)]
        if any(prompt[:start] != self._prefix for prompt in prompts):
            raise ValueError("lm-eval encoded a batch of prompts differently from the single prompts")
        tokens, own = self._padded([prompt[start:] for prompt in prompts], "left")
        same = torch.tensor([self._prefix], device=self.device).expand(len(prompts), -1)
        state = self._state_after(self._prefix, len(prompts))
        return torch.cat([same, tokens], dim=1), torch.cat([torch.ones_like(same), own], dim=1), state


def _units(context: tuple[int, ...], numbers: list[int], answers: list[tuple], size: int) -> Iterator[Unit]:
    """Splits the answers to one context into units that fit a batch; answers of one token take no room of their own."""
    ordered = sorted(numbers, key=lambda number: (-len(answers[number]), answers[number], number))
    longer = [number for number in ordered if len(answers[number]) > 1]
    parts = [longer[start : start + size] for start in range(0, len(longer), size)] or [[]]
    weights = [max(1, len(part)) for part in parts]
    parts[-1] = parts[-1] + ordered[len(longer) :]
    for part, weight in zip(parts, weights, strict=True):
        yield Unit(context, tuple(part), len(answers[part[0]]) - 1, weight)


@contextmanager
def _plain_greedy(model) -> Iterator[None]:
    """Reduces the model's generation_config to its token ids inside the block.

    do_sample=False leaves the checkpoint's beams, penalties and suppressed tokens in force, and they also fill up a
    `generation_config=` argument. The object is changed in place, because wrappers such as PEFT share it.
    """
    config = model.generation_config
    own = vars(config)
    tokens = {name: own[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config.__dict__ = vars(GenerationConfig(**tokens))
    try:
        yield
    finally:
        config.__dict__ = own


def _without_nan(logits):
    if torch.isnan(logits).any():
        raise ArithmeticError("the model's logits are NaN")
    return logits


def load_tokenizer(source: str, trust_remote_code: bool):
    """Loads the tokenizer of a checkpoint and gives it a padding token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        if len(tokenizer) == 0:
            raise ValueError("it has no tokens")
    except Exception as error:  # damaged files can fail anywhere in transformers
        reason = one_line(error)
        raise ValueError(f"{source}: no tokenizer can be loaded ({reason}); name one with --tokenizer") from None
    return with_padding(tokenizer)


def with_padding(tokenizer):
    """Returns the tokenizer with a padding token from its vocabulary, which will do because padding is masked."""
    if tokenizer.pad_token_id is None:
        others = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        known = [token for token in others if token is not None]
        tokenizer.pad_token = known[0] if known else tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(folder: str, settings):
    """Loads a causal LM through transformers, on one device unless there is a device map."""
    options = {}  # a None would replace the quantization_config of a quantised checkpoint
    if settings.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=settings.dtype,
            device_map=settings.device_map or {"": settings.device},  # a quantised model cannot be moved afterwards
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a damaged checkpoint can fail anywhere in transformers
        reason = one_line(error)
        raise ValueError(f"{folder}: transformers cannot load it as a causal language model ({reason})") from None
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder}: its weight files lack {len(missing)} tensors of a {type(model).__name__}, such as {missing[0]} "
            "(transformers fills them with random values); check the files and model_type in config.json"
        )
    return model.eval()


def context_length(config, tokenizer, given: int | None, name: str) -> int:
    """Returns the longest input in tokens: as given, else as the configuration or the tokenizer says.

    lm-eval falls back to 2048 if it finds nothing, and would cut long prompts that the model could read.
    """
    if given:
        return given
    nested = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    lengths = [
        getattr(place, key, None) for place in (config.get_text_config(), config, *nested) for key in LENGTH_NAMES
    ]
    for length in (*lengths, getattr(tokenizer, "model_max_length", None)):
        if isinstance(length, int) and 0 < length < UNLIMITED:
            return length
    raise ValueError(f"{name}: neither configuration nor tokenizer says how long an input may be; pass --max-length")
