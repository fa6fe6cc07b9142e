"""Logit processors that a server under test adds (--logit-processors)."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class Only(CustomLogitProcessor):
    """Leaves the one id of each request, and says what it was asked."""

    def validate(self, params: dict[str, Any], vocab_size: int) -> None:
        if not 0 <= params.get("token_id", -1) < vocab_size:
            raise ValueError(f"token_id has to be one of {vocab_size}")

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        assert custom_param_list is not None and len(custom_param_list) == len(logits)
        masked = torch.full_like(logits, float("-inf"))
        for row, params in enumerate(custom_param_list):
            assert params["__req__"].origin_input_ids
            masked[row, params["token_id"]] = logits[row, params["token_id"]]
        return masked


class Fails(CustomLogitProcessor):
    """Does what a processor should not, after some tokens."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        assert custom_param_list is not None
        for row, params in enumerate(custom_param_list):
            if len(params["__req__"].output_ids) < params.get("after", 0):
                continue
            if params["how"] == "raise":
                raise RuntimeError(f"no more of {params['what']}")
            if params["how"] == "shape":
                return logits[:, :-1]
            logits[row] = float(params["how"])
        return logits
