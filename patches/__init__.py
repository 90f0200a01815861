"""One file per shape of decoder layer; each defines SPECS, of hf_triton_mlp.patching.MLPSpec."""
