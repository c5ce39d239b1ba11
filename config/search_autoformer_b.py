# AutoFormer-B, searched as AutoFormer-T: 1.01e13 architectures of 42 to 77 million parameters.
# python prepare.py --dataset=imagenet --img_size=224
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_autoformer_b.py config/drnas.py
# Published top-1 accuracy of the subnet that an evolutionary search found: 82.4%.
include('search_autoformer_t.py')
out_dir = 'out/search_autoformer_b'
n_embd = [528, 576, 624]
n_layer = [14, 15, 16]
n_head = [9, 10]
mlp_ratio = [3, 3.5, 4]
