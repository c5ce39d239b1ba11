# AutoFormer-S on ImageNet at 224 pixels with the published settings: 500 epochs, 1,024 images a step.
# 7.71e13 architectures of 13 to 35 million parameters; 8% of the training images, as many as in the published subset, train the alphas.
# python prepare.py --dataset=imagenet --img_size=224
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_autoformer_s.py config/drnas.py
# Published top-1 accuracy of the subnet that an evolutionary search found: 81.7%.
space = 'autoformer'
out_dir = 'out/search_autoformer_s'
dataset = 'imagenet'
n_embd = [320, 384, 448]
n_head = [5, 6, 7]
mlp_ratio = [3, 3.5, 4]
train_portion = 0.92
batch_size = 129 # 43 images, three times each
gradient_accumulation_steps = 8
max_iters = 575500
eval_interval = 5755
flip = True
resized_crop = 0.08
rand_augment = 9
random_erasing = 0.25
repeated_augmentation = 3
label_smoothing = 0.1
mixup = 0.8
cutmix = 1.0
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 23020
weight_decay = 0.05
beta2 = 0.999
grad_clip = 0.0
arch_learning_rate = 6e-4
