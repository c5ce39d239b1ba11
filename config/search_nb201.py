# NAS-Bench-201 on CIFAR-10 with the published settings of DrNAS, 100 epochs of the half that trains the weights; one GPU.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_nb201.py config/drnas.py
# torchrun --standalone --nproc_per_node=4 train_search.py config/search_nb201.py --gradient_accumulation_steps=4 --batch_size=16
# Published test accuracies in % (DrNAS' README): DrNAS 94.36, PC-DARTS 93.41, SNAS 92.77, DARTS 54.30; the best cell of all 94.37.
space = 'nb201'
out_dir = 'out/search_nb201'
dataset = 'cifar10'
affine = False
batch_size = 64
train_portion = 0.5
max_iters = 39000
eval_interval = 1950
eval_iters = 200
crop = 4
flip = True
weight_optimizer = 'sgd'
learning_rate = 0.025
min_lr = 1e-3
weight_decay = 3e-4
warmup_iters = 0
grad_clip = 5.0
arch_learning_rate = 3e-4
