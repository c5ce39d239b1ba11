# AutoFormer-S, searched as AutoFormer-T: 7.71e13 architectures of 13 to 35 million parameters.
# python prepare.py --dataset=imagenet --img_size=224
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_autoformer_s.py config/drnas.py
# Published top-1 accuracy of the subnet that an evolutionary search found: 81.7%.
include('search_autoformer_t.py')
out_dir = 'out/search_autoformer_s'
n_embd = [320, 384, 448]
n_head = [5, 6, 7]
mlp_ratio = [3, 3.5, 4]
