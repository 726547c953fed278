"""Other libraries' insides: private names of torch, transformers, accelerate and PEFT, one file each."""
