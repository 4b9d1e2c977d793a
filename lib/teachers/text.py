"""Prompts: a small text encoder with a word a token, and what any pipeline's own gives its network."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BEGIN, END = "<begin>", "<end>"
FEW = 256
"""Prompts that a text encoder reads at once."""


def tokenizer(words: Iterable[str], longest: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows these words and no other.

    Parameters
    ----------
    longest : int, words of a prompt
    """
    known = {word: number for number, word in enumerate([BEGIN, END, *sorted(set(words))])}
    made = Tokenizer(models.WordLevel(known))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}",
                                                        special_tokens=[(BEGIN, known[BEGIN]), (END, known[END])])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BEGIN, eos_token=END, pad_token=END,
                                   model_max_length=longest + 2)


def encoder(words: PreTrainedTokenizerBase, width: int, layers: int) -> CLIPTextModel:
    """Build the text half of CLIP (Radford et al. 2021), small, for a tokenizer."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32), max_position_embeddings=words.model_max_length,
        projection_dim=width, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id))


class Text(nn.Module):
    """A CLIP text model and its tokenizer, as Stable Diffusion reads a prompt: the last hidden state of each token.

    A prompt is read once, and what came of it is kept until the encoder learns on (`train`).
    """

    def __init__(self, encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self._read: dict[str, Tensor] = {}

    @property
    def parts(self) -> dict[str, nn.Module | PreTrainedTokenizerBase]:
        """What a saved pipeline has of it, by name."""
        return {"text_encoder": self.encoder, "tokenizer": self.tokenizer}

    def train(self, mode: bool = True) -> Self:
        """Switch between learning and reading, and forget what was read."""
        self._read.clear()
        return super().train(mode)

    @property
    def config(self) -> Mapping:
        """What decides a prompt's states beside the weights: the vocabulary."""
        return {"words": sorted(self.tokenizer.get_vocab().items())}

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Give the tokens of prompts, (n, L), int64, L the most that the encoder reads.

        Raises
        ------
        ValueError
            Naming the first word that a vocabulary of whole words does not know; if a prompt is too long.
        """
        known = self.tokenizer.get_vocab()
        if isinstance(self.tokenizer.backend_tokenizer.model, models.WordLevel):
            for prompt in prompts:
                if strange := [word for word in prompt.split() if word not in known]:
                    raise ValueError(f"prompt {prompt!r}: nobody taught this model the word {strange[0]!r}. It knows: "
                                     f"{', '.join(word for word in known if word not in (BEGIN, END))}")
        longest = self.tokenizer.model_max_length
        rows = self.tokenizer(list(prompts)).input_ids
        for prompt, row in zip(prompts, rows):
            if len(row) > longest:
                raise ValueError(f"prompt {prompt!r} has {len(row) - 2} tokens; this model reads {longest - 2}")
        padded = self.tokenizer(list(prompts), padding="max_length", max_length=longest, return_tensors="pt")
        return padded.input_ids

    def read(self, tokens: Tensor) -> Tensor:
        """Give what the encoder makes of tokens, (n, L) to (n, L, D)."""
        return self.encoder(tokens.to(self.encoder.device)).last_hidden_state

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Give what a network reads of prompts, on the CPU: encoder_hidden_states, (n, L, D)."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._read]:
            states = torch.cat([self.read(some).cpu() for some in self.tokens(new).split(FEW)])
            self._read.update(zip(new, states))
        return {"encoder_hidden_states": torch.stack([self._read[prompt] for prompt in prompts])}


class TwoTexts(nn.Module):
    """Two CLIP text models, as SDXL reads a prompt: the last hidden states but one, side by side, and the second's sum.

    Parameters
    ----------
    first, second : Text
    side : int, pixels of the images that are drawn, which the network is told (original and target size, no crop)
    zeros : bool, whether no prompt is zeros (the pipeline's ``force_zeros_for_empty_prompt``)
    """

    def __init__(self, first: Text, second: Text, side: int, zeros: bool):
        super().__init__()
        self.first, self.second, self.side, self.zeros = first, second, side, zeros
        self._read: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def config(self) -> Mapping:
        """What decides a prompt's states beside the weights."""
        return {"first": self.first.config, "second": self.second.config, "side": self.side, "zeros": self.zeros}

    @property
    def parts(self) -> dict[str, nn.Module | PreTrainedTokenizerBase]:
        """What a saved pipeline has of it, by name."""
        return self.first.parts | {f"{name}_2": part for name, part in self.second.parts.items()}

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Give the tokens of prompts for both, (n, 2, L)."""
        return torch.stack([self.first.tokens(prompts), self.second.tokens(prompts)], dim=1)

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Give what both make of tokens, (n, 2, L): states (n, L, D), and the second's sum (n, E)."""
        seen = [text.encoder(rows.to(text.encoder.device), output_hidden_states=True)
                for text, rows in zip((self.first, self.second), tokens.unbind(1))]
        return torch.cat([encoded.hidden_states[-2] for encoded in seen], dim=-1), seen[1].text_embeds

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> dict[str, Tensor | dict[str, Tensor]]:
        """Give what a network reads of prompts, on the CPU."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._read]:
            for some in [new[begin:begin + FEW] for begin in range(0, len(new), FEW)]:
                self._read.update(zip(some, zip(*(part.cpu() for part in self.read(self.tokens(some))))))
            if self.zeros and "" in new:
                self._read[""] = tuple(map(torch.zeros_like, self._read[""]))
        states, sums = (torch.stack(rows) for rows in zip(*(self._read[prompt] for prompt in prompts)))
        sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]], dtype=states.dtype)
        return {"encoder_hidden_states": states,
                "added_cond_kwargs": {"text_embeds": sums, "time_ids": sizes.expand(len(states), -1)}}
