"""Run the command line: `sdgm-edge …`, or `python -m sdgm_edge …`, which is also what `torchrun -m` takes."""


def main() -> None:
    """Run the command line, and end as it does where Ctrl-C comes while it is still being imported."""
    try:
        from .cli import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    main()


if __name__ == "__main__":
    main()
