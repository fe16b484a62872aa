"""`python -m qlora_trainer` and `accelerate launch -m qlora_trainer`."""

from qlora_trainer.cli.app import main

if __name__ == "__main__":
    main()
