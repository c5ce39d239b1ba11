# AutoFormer-S, trained as AutoFormer-T. What a search found, or the published network:
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_autoformer_s.py --arch=out/search_autoformer_s_drnas/arch.json
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_autoformer_s.py --space=autoformer --genotype=autoformer_s
include('base_autoformer_t.py')
out_dir = 'out/base_autoformer_s'
n_embd = [320, 384, 448]
n_head = [5, 6, 7]
