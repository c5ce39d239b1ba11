# AutoFormer-T on ImageNet at 224 pixels with the published settings: 500 epochs, 1,024 images a
# step. 1.06e9 architectures of 5.4 to 10.5 million parameters. 8% of the training images train
# the alphas, as many as in the published subset.
# python prepare.py --dataset=imagenet --img_size=224
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_autoformer_t.py config/drnas.py
# Published top-1 accuracy of the subnet that an evolutionary search found: 74.7%.
include('shared/autoformer_imagenet.py')
space = 'autoformer'
out_dir = 'out/search_autoformer_t'
train_portion = 0.92
max_iters = 575500
eval_interval = 5755
warmup_iters = 23020
arch_learning_rate = 6e-4
