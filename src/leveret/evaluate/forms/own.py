"""Your own questions."""

from __future__ import annotations

from leveret.evaluate.forms.base import Form, Item, Place
from leveret.pool import open_source
from leveret.records import IMAGE_MARK
from leveret.runs import DataError


def _own(place: Place) -> list[Item]:
    """Your own questions in LLaVA's form: each user turn is asked by itself, its answer is the turn that follows."""
    items = []
    for path in place.files:
        source = open_source(path, place.root / place.images)
        for index in range(len(source)):
            sample = source.sample(index)
            if len(sample.images) > 1:
                raise DataError(f"{path}, sample {index} ({sample.id}): {len(sample.images)} pictures; allowed is one.")
            image = sample.images[0] if sample.images else None
            turns = [turn for turn in sample.turns if turn.role != "system"]
            for number, (asked, said) in enumerate(zip(turns[::2], turns[1::2], strict=False)):
                items.append(
                    Item(
                        question_id=sample.id if not number else f"{sample.id}#{number}",
                        image=image,
                        prompt=place.prompt.format(question=asked.text.replace(IMAGE_MARK, "").strip()),
                        gold=said.text.strip(),
                        template=str(sample.meta.get("template", "")),
                        meta={"image_id": source.root.name(image) if image else f"text/{sample.id}"},
                    )
                )
    return items


OWN = {"own": Form(_own)}
