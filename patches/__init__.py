"""One file per architecture family; each defines SPEC, an hf_triton_mlp.patching.MLPSpec."""
