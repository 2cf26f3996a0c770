"""Q-Former: learned queries through a BERT that also looks at a tower's tokens. [N, n, W] -> [N, queries, D].

BLIP-2 (arXiv 2301.12597), in the form of TinyLLaVA Factory (tinyllava/model/connector/qformer.py): BERT's sizes, random
weights, no text branch, no language-side pretraining. The blocks are transformers' own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QFormer(nn.Module):
    """Queries, a norm without weights, BERT blocks of which every `cross_every`-th looks at the tokens, Linear to D.

    `width`, `layers`, `heads`, `hidden` (of the feed-forward), `dropout` and `norm_eps` are BERT's; the Factory takes
    them from google-bert/bert-base-uncased. Names as published, but `attention.self` reads `attention.attention`:
    see model/published.py. The norm has no weights because the Factory deletes BERT's (a trained
    checkpoint has none to load).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        queries: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        cross_every: int,
        dropout: float,
        norm_eps: float,
    ) -> None:
        from transformers import Blip2QFormerConfig
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerEncoder

        super().__init__()
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=hidden,
            encoder_hidden_size=in_width,
            cross_attention_frequency=cross_every,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            layer_norm_eps=norm_eps,
            use_qformer_text_input=False,
        )
        config._attn_implementation = "sdpa"
        self.bert = nn.ModuleDict({"encoder": Blip2QFormerEncoder(config)})
        for module in self.bert.modules():
            if isinstance(module, nn.Linear):  # as BERT begins, not as torch's Linear does
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.query_tokens = nn.Parameter(torch.empty(1, queries, width))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.norm = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.dropout = nn.Dropout(dropout)
        self.projector = nn.Linear(width, out_width)

    def forward(self, input: Tensor) -> Tensor:
        queries = self.dropout(self.norm(self.query_tokens.expand(len(input), -1, -1)))
        seen = self.bert["encoder"](queries, encoder_hidden_states=input, query_length=queries.shape[1])
        return self.projector(seen.last_hidden_state)
