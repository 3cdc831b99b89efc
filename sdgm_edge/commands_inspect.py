"""The command that shows what is in a bundle; no torch. What `cli.py` says of commands holds here too."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import console
from .commands_device import BundleArgument, newest_bundle


def inspect(
    bundle: BundleArgument = None,
    mixture: Annotated[
        bool, typer.Option("--mixture", help="Tell what each component of the mixture stands for.")
    ] = False,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", help="Text to look at with --mixture. Default: some that the model makes up."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what is in a bundle."""
    from sdgm_edge.runtime import UsageError, read_bundle

    bundle = bundle or newest_bundle()
    if mixture:
        _inspect_mixture(bundle, texts, as_json)
        return
    if texts:
        raise UsageError("--text is what --mixture looks at: add --mixture")
    found = read_bundle(bundle)
    manifest, config = found.manifest, found.config
    record: dict[str, Any] = {
        "name": manifest.name,
        "model_id": manifest.model_id,
        "default": manifest.default,
        "num_parameters": manifest.num_parameters,
        "vocab_size": config.vocab_size,
        "state_bytes": 4 * config.state_size,
        "mixing_size": config.mixing_size,
        "atoms": None if manifest.atoms is None else manifest.atoms._asdict(),
        "mixture_components": found.mixture.num_components if found.mixture else 0,
        "model": config.model,
        "made_with": manifest.made_with,
        "files": {name: size for name, (_, size) in manifest.files.items()},
        "variants": {name: variant._asdict() for name, variant in manifest.variants.items()},
    }
    if as_json:
        console.print_json(record)
        return
    for name in ("atoms", "model", "made_with", "files"):
        record |= {f"{name}.{key}": value for key, value in (record.pop(name) or {}).items()}
    for name, variant in record.pop("variants").items():
        for gate in ("parity", "accuracy"):
            record |= {f"{name}.{gate}.{key}": value for key, value in (variant[gate] or {}).items()}
    console.print_record(record, title=str(bundle))


def _inspect_mixture(bundle: Path, texts: list[str] | None, as_json: bool) -> None:
    from sdgm_edge.runtime import Generator

    from .sources import read_text

    generator = Generator.load(bundle)
    components = generator.mixture("--mixture")
    if texts:
        text = read_text(texts)
    else:
        made_up = [
            generator.generate(None, max_new_tokens=512, temperature=1.0, top_p=1.0, seed=seed)
            for seed in range(8)
        ]
        text = "".join(generation.text for generation in made_up)
    ids, mixing_TM = generator.mixing(text)
    record: list[dict[str, Any]] = [
        {
            "component": c.component,
            "weight": c.weight,
            "share": c.share,
            "spread": c.spread,
            "tokens": [{"token": i, "text": generator.decode([i]), "lift": lift} for i, lift in c.tokens],
        }
        for c in components.report(mixing_TM, ids)
    ]
    if as_json:
        console.print_json({"num_tokens": len(ids), "components": record})
        return
    console.print_table(
        ("component", "weight", "share", "spread", "typical tokens (times more frequent than elsewhere)"),
        [
            (
                c["component"],
                c["weight"],
                c["share"],
                c["spread"],
                "  ".join(f"{t['text']!r} ×{t['lift']:.1f}" for t in c["tokens"]),
            )
            for c in record
        ],
        title=f"{bundle}: on {len(ids):,} tokens {'of this text' if texts else 'that the model made up'}",
    )
