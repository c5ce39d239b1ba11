# AutoFormer-B, trained as AutoFormer-T. What a search found, or the published network:
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_autoformer_b.py --arch=out/search_autoformer_b_drnas/arch.json
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_autoformer_b.py --space=autoformer --genotype=autoformer_b
include('base_autoformer_t.py')
out_dir = 'out/base_autoformer_b'
n_embd = [528, 576, 624]
n_layer = [14, 15, 16]
n_head = [9, 10]
