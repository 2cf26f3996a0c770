        description="Samples in one pass on one rank; gradients add up to the batch. All at once when left out.",
    )
    order: Literal["length", "modality", "random", "llava", "tinyllava", "prismatic"] = Field(
        "length",
        description="Which samples make a step: alike in length; the same, each step with images or without; as they "
        "fall; or as LLaVA and Bunny, TinyLLaVA Factory or Prismatic group them.",
    )
    schedule: Literal["cosine", "wsd", "constant", "linear"] = Field(
        "cosine", description="Shape of the learning rate after the warm-up."
    )
    warmup: Share = Field(0.03, description="Share of the steps over which the rate rises.")
    decay: Share = Field(0.2, description="Share of the steps over which wsd falls to zero at the end.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW); never on biases and norms.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's two averages."
    )
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    clip: float | None = Field(1.0, gt=0, description="Largest norm of the whole gradient; null never clips.")
    max_tokens: int = Field(2048, ge=8, description="Longer samples are cut at the right end.")
    pack: bool | Literal["auto"] = Field(
        "auto",
        description="All samples of a pass in one row, none seeing another, instead of one a row with padding. auto: "
        "on a GPU, where the language model's attention takes such rows as they are.",
    )
    recompute: bool = Field(
        False, description="Gradient checkpointing: the language model's layers are computed again on the way back."
    )
